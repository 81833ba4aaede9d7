"""A load test's report: the JSON that docs/loadtest.md describes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fusionserve.loadtest.fairness import by_adapter, fairness, stream_speed
from fusionserve.loadtest.latency import Latencies, Spread, missed_levels
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest.residency import COLD, JOINED, WARM
from fusionserve.loadtest.timeline import timeline
from fusionserve.loadtest_config import KINDS, LoadConfig

FORMAT = "fusionserve-loadtest"
FORMAT_VERSION = 1  # grows when a field changes its meaning or goes; new fields may come without

Json = dict[str, Any]


def to_report(outcome: Outcome) -> Json:
    """Everything that was measured, ready for json.dumps; absent figures are None."""
    counted, seconds = outcome.counted, outcome.seconds
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "started_at": outcome.started_at.isoformat(timespec="seconds"),
        "server": _server(outcome),
        "config": _config(outcome.config),
        "workload": _workload(outcome),
        "seconds": seconds,
        "was_stopped": outcome.was_stopped,
        "requests": _requests(outcome),
        "errors": _errors(counted),
        "throughput": _throughput(counted, seconds),
        "goodput": _goodput(outcome),
        "latency": Latencies.of(counted).to_json(),
        "by_kind": _groups(
            {kind: [each for each in counted if each.kind == kind] for kind in KINDS}, seconds
        ),
        "by_residency": _groups(_by_residency(outcome), seconds),
        "by_adapter": _groups(by_adapter(counted), seconds),
        "fairness": dataclasses.asdict(fairness(counted, seconds or 1.0)),
        "client": _client(outcome),
        "timeline": dataclasses.asdict(timeline(outcome)) if counted else None,
    }


def to_request_line(record: RequestRecord, residency: str) -> Json:
    """One request, for the file of raw measurements; times in seconds from the start of the run."""
    line = dataclasses.asdict(record)
    return {**line, "residency": residency, "ttft_s": record.ttft_s, "e2e_s": record.e2e_s}


def _server(outcome: Outcome) -> Json:
    model = dataclasses.asdict(outcome.catalog.model)
    return {"target": outcome.config.target, **model}


def _workload(outcome: Outcome) -> Json:
    """What requests were drawn from, where the configuration leaves it to the server."""
    catalog = outcome.catalog
    return {"mix": dict(catalog.mix), "adapters": list(catalog.adapters), "fusions": list(catalog.fusions)}


def _config(config: LoadConfig) -> Json:
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields["service_levels"] = dataclasses.asdict(config.service_levels)
    for name in ("prompt_lengths", "output_lengths"):
        fields[name] = str(fields[name])
    fields["prompt_file"] = None if config.prompt_file is None else config.prompt_file.name
    return fields


def _requests(outcome: Outcome) -> Json:
    num_ok = sum(record.is_ok for record in outcome.counted)
    return {
        "sent": len(outcome.counted),
        "succeeded": num_ok,
        "failed": len(outcome.counted) - num_ok,
        "not_sent": outcome.num_not_sent,
        "warm_up": len(outcome.records) - len(outcome.counted),
    }


def _errors(counted: Iterable[RequestRecord]) -> list[Json]:
    """By status and reason, the most frequent first, each with the text of one of them."""
    failed = [record for record in counted if not record.is_ok]
    messages = {(record.status, record.reason): record.message for record in failed}
    counts = Counter((record.status, record.reason) for record in failed)
    return [
        {"status": status, "reason": reason, "count": count, "example": messages[status, reason]}
        for (status, reason), count in counts.most_common()
    ]


def _throughput(records: Sequence[RequestRecord], seconds: float) -> Json:
    """Of the requests that succeeded, by the whole window."""
    succeeded = [record for record in records if record.is_ok]
    totals = {
        "requests_per_s": len(succeeded),
        "prompt_tokens_per_s": sum(record.prompt_tokens for record in succeeded),
        "cached_prompt_tokens_per_s": sum(record.cached_tokens for record in succeeded),
        "generated_tokens_per_s": sum(record.generated_tokens for record in succeeded),
    }
    return {name: total / seconds if seconds else 0.0 for name, total in totals.items()}


def _goodput(outcome: Outcome) -> Json:
    """Requests that succeeded within every service level; those not sent count as asked for."""
    levels = outcome.config.service_levels
    misses = [missed_levels(record, levels) for record in outcome.counted if record.is_ok]
    num_good = sum(not missed for missed in misses)
    num_asked = len(outcome.counted) + outcome.num_not_sent
    return {
        "service_levels": dataclasses.asdict(levels),
        "requests_per_s": num_good / outcome.seconds if outcome.seconds else 0.0,
        "share": num_good / num_asked if num_asked else None,
        "missed": dict(Counter(name for missed in misses for name in missed)),
    }


def _by_residency(outcome: Outcome) -> dict[str, list[RequestRecord]]:
    groups: dict[str, list[RequestRecord]] = {COLD: [], JOINED: [], WARM: []}
    for record in outcome.counted:
        groups.get(outcome.residencies[record.index], []).append(record)
    return groups


def _groups(groups: Mapping[str, Sequence[RequestRecord]], seconds: float) -> dict[str, Json]:
    """Those that have requests."""
    return {
        name: {
            "requests": len(group),
            "failed": sum(not record.is_ok for record in group),
            **_throughput(group, seconds),
            "stream_tokens_per_s": stream_speed(group),
            "latency": Latencies.of(group).to_json(),
        }
        for name, group in groups.items()
        if group
    }


def _client(outcome: Outcome) -> Json:
    """Whether the load generator kept up: its processor time, how late it sent, and the most requests at once."""
    delay = Spread.of(record.sent_s - record.due_s for record in outcome.counted)
    return {
        "cpu_s": outcome.client_cpu_s,
        "most_in_flight": outcome.most_in_flight,
        "send_delay_s": None if delay is None else dataclasses.asdict(delay),
    }
