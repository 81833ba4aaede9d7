"""Do all adapters get the same service? Over the requests for one LoRA adapter, adapter by adapter.

Jain's index of x_1 .. x_n is (sum x)^2 / (n * sum x^2): 1 if all are equal, 1/n if one has everything (R. Jain, D.
Chiu, W. Hawe, "A Quantitative Measure of Fairness and Discrimination for Resource Allocation in Shared Computer
Systems", DEC Research Report TR-301, 1984).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionserve.loadtest.latency import Latencies, Spread
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest_config import LORA


@dataclass(frozen=True, slots=True, kw_only=True)
class Fairness:
    """Jain's indices and the spread of waiting; None where no adapter was used or none answered.

    `jain_speed` is over the tokens/s that an adapter's requests see: its tokens by the sum of their end-to-end times,
    failed ones included. It does not depend on how often an adapter is asked for. `jain_tokens_per_s` is over the
    tokens/s each adapter got, which under a Zipf popularity is unequal by demand alone.
    """

    adapters: int
    jain_speed: float | None
    jain_tokens_per_s: float | None
    worst_adapter: str | None
    worst_requests: int | None  # that its p99 is of; of a handful it is just the slowest
    worst_ttft_p99_s: float | None
    median_ttft_p99_s: float | None  # over the adapters' p99 TTFTs
    worst_to_median: float | None


def jain_index(shares: Sequence[float]) -> float | None:
    """(sum x)^2 / (n * sum x^2); None without a share above 0."""
    squares = sum(share * share for share in shares)
    return sum(shares) ** 2 / (len(shares) * squares) if squares else None


def by_adapter(records: Sequence[RequestRecord]) -> dict[str, list[RequestRecord]]:
    """The requests for one LoRA adapter, by its name, the most asked for first."""
    groups: dict[str, list[RequestRecord]] = {}
    for record in records:
        if record.kind == LORA:
            groups.setdefault(record.names[0], []).append(record)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def fairness(records: Sequence[RequestRecord], window_s: float) -> Fairness:
    """Over the adapters that `records` ask for, which ran in `window_s` seconds."""
    groups = by_adapter(records)
    ttfts = _ttfts(groups)
    worst = max(ttfts, key=lambda name: ttfts[name].p99, default=None)
    worst_s = None if worst is None else ttfts[worst].p99
    median_s = statistics.median(spread.p99 for spread in ttfts.values()) if ttfts else None
    return Fairness(
        adapters=len(groups),
        jain_speed=jain_index([stream_speed(group) for group in groups.values()]),
        jain_tokens_per_s=jain_index([_tokens(group) / window_s for group in groups.values()]),
        worst_adapter=worst,
        worst_requests=None if worst is None else ttfts[worst].count,
        worst_ttft_p99_s=worst_s,
        median_ttft_p99_s=median_s,
        worst_to_median=worst_s / median_s if worst_s is not None and median_s else None,
    )


def stream_speed(group: Sequence[RequestRecord]) -> float:
    """Tokens of the requests that succeeded, by the seconds that all of them took."""
    total_s = sum(record.e2e_s for record in group)
    return _tokens(group) / total_s if total_s > 0 else 0.0


def _tokens(group: Sequence[RequestRecord]) -> int:
    return sum(record.generated_tokens for record in group if record.is_ok)


def _ttfts(groups: Mapping[str, Sequence[RequestRecord]]) -> dict[str, Spread]:
    spreads = {name: Latencies.of(group).ttft_s for name, group in groups.items()}
    return {name: spread for name, spread in spreads.items() if spread is not None}
