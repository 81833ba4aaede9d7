"""A load test's report for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fusionserve.loadtest.load_report import Json
from fusionserve.loadtest.outcome import Outcome

_METRICS = {"ttft_s": "TTFT", "itl_s": "ITL", "tpot_s": "TPOT", "e2e_s": "end to end"}
_LEVELS = {"ttft": "TTFT", "itl": "ITL", "tpot": "TPOT", "e2e": "end to end"}
_COLUMNS = ("p50", "p90", "p99", "mean", "max")
MAX_ADAPTERS = 10  # shown one by one; the rest are in the JSON


def to_text(outcome: Outcome, report: Json) -> str:
    """What a person wants to know first, in at most 100 columns."""
    parts = (
        _head(outcome, report),
        _rates(report),
        _latency_table(report["latency"]),
        _group_table("kind", report["by_kind"]),
        _group_table("adapter was", report["by_residency"]),
        _group_table("adapter", report["by_adapter"], MAX_ADAPTERS),
        _fairness(report["fairness"]),
        _errors(report),
        _client(report),
    )
    return "\n\n".join("\n".join(lines) for part in parts if (lines := list(part)))


def _head(outcome: Outcome, report: Json) -> Iterator[str]:
    server, requests = report["server"], report["requests"]
    yield f"{server['name']} ({server['dtype']}) at {server['target']}, {outcome.config.streams}"
    stopped = ", stopped early" if report["was_stopped"] else ""
    not_sent = f", {requests['not_sent']} not sent (limit in flight)" if requests["not_sent"] else ""
    yield (
        f"{requests['sent']} requests in {report['seconds']:.1f} s{stopped}: {requests['succeeded']} succeeded, "
        f"{requests['failed']} failed{not_sent}; {requests['warm_up']} more to warm up"
    )


def _rates(report: Json) -> Iterator[str]:
    rates = report["throughput"]
    cached = rates["cached_prompt_tokens_per_s"]
    yield (
        f"throughput  {rates['requests_per_s']:.2f} requests/s, {rates['prompt_tokens_per_s']:.0f} prompt tokens/s"
        f"{f' ({cached:.0f} from the prefix cache)' if cached else ''}, "
        f"{rates['generated_tokens_per_s']:.1f} generated tokens/s"
    )
    yield from _goodput(report["goodput"])


def _goodput(goodput: Mapping[str, Any]) -> Iterator[str]:
    """Nothing without a service level."""
    limits = {name.removesuffix("_s"): limit for name, limit in goodput["service_levels"].items()}
    wanted = [f"{_LEVELS[name]} <= {_duration(limit)}" for name, limit in limits.items() if limit is not None]
    if wanted:
        yield f"goodput     {goodput['requests_per_s']:.2f} requests/s, {_share(goodput['share'])} of all requests"
        yield f"            within {', '.join(wanted)}"
    if goodput["missed"]:
        missed = (f"{count} x {_LEVELS[name]}" for name, count in goodput["missed"].items())
        yield f"            missed: {', '.join(missed)}"


def _latency_table(latency: Mapping[str, Any]) -> Iterator[str]:
    yield f"{'ms':12}" + "".join(f"{column:>10}" for column in _COLUMNS) + f"{'samples':>10}"
    for metric, name in _METRICS.items():
        spread = latency[metric]
        if spread is not None:
            numbers = "".join(f"{_ms(spread[column]):>10}" for column in _COLUMNS)
            yield f"{name:12}{numbers}{spread['count']:>10}"


def _group_table(label: str, groups: Mapping[str, Json], most: int = 100) -> Iterator[str]:
    """One line per group, if there is more than one."""
    if len(groups) < 2:
        return
    yield (
        f"{label:20}{'requests':>9}{'failed':>7}{'tokens/s':>9}{'TTFT p50':>10}{'p99':>9}"
        f"{'ITL p50':>10}{'p99':>8}{'TPOT p50':>9}{'p99':>8}"
    )
    for name, group in list(groups.items())[:most]:
        latency = group["latency"]
        yield (
            f"{_cut(name, 19):20}{group['requests']:>9}{group['failed']:>7}{group['generated_tokens_per_s']:>9.1f}"
            f"{_of(latency['ttft_s'], 'p50'):>10}{_of(latency['ttft_s'], 'p99'):>9}"
            f"{_of(latency['itl_s'], 'p50'):>10}{_of(latency['itl_s'], 'p99'):>8}"
            f"{_of(latency['tpot_s'], 'p50'):>9}{_of(latency['tpot_s'], 'p99'):>8}"
        )
    if len(groups) > most:
        yield f"... and {len(groups) - most} more"


def _fairness(fairness: Mapping[str, Any]) -> Iterator[str]:
    if fairness["adapters"] < 2 or fairness["jain_speed"] is None:
        return
    yield (
        f"fairness    Jain's index over {fairness['adapters']} adapters: {fairness['jain_speed']:.3f} of the speed "
        f"their streams see, {fairness['jain_tokens_per_s']:.3f} of tokens/s"
    )
    if fairness["worst_to_median"] is not None:
        yield (
            f"            worst p99 TTFT {_ms(fairness['worst_ttft_p99_s'])} ms "
            f"({_cut(fairness['worst_adapter'], 19)}, {_requests(fairness['worst_requests'])}), "
            f"{fairness['worst_to_median']:.2f} x the median adapter's"
        )


def _errors(report: Json) -> Iterator[str]:
    for error in report["errors"]:
        words = " ".join(filter(None, (error["status"], error["reason"])))
        text = f"{words}: {error['example']}"
        yield f"{error['count']} x {_cut(text, 90)}"


def _client(report: Json) -> Iterator[str]:
    client = report["client"]
    if client["send_delay_s"] is not None:
        yield (
            f"load generator: {client['cpu_s']:.1f} s of processor time, at most {client['most_in_flight']} requests "
            f"in flight, sent late by {_ms(client['send_delay_s']['p99'])} ms (p99)"
        )


def _of(spread: Mapping[str, float] | None, column: str) -> str:
    return "-" if spread is None else _ms(spread[column])


def _ms(seconds: float) -> str:
    """Milliseconds with three digits or more."""
    ms = seconds * 1000
    return f"{ms:.0f}" if ms >= 99.95 else f"{ms:.1f}" if ms >= 9.995 else f"{ms:.2f}"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:g} ms" if seconds < 1 else f"{seconds:g} s"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
