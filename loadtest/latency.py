"""Percentiles of latencies, and which requests kept the service levels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest_config import ServiceLevels

QUANTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How some latencies are distributed, in seconds; percentiles are interpolated between neighbours."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Iterable[float | None]) -> Spread | None:
        """Of what is there; None if nothing is."""
        known = np.array([each for each in seconds if each is not None])
        if not known.size:
            return None
        p50, p90, p99 = (float(each) for each in np.percentile(known, QUANTILES))
        return cls(
            count=int(known.size), mean=float(known.mean()), p50=p50, p90=p90, p99=p99, max=float(known.max())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Of the requests that succeeded; None where no request has such a latency."""

    ttft_s: Spread | None
    itl_s: Spread | None  # over all gaps of all requests
    tpot_s: Spread | None
    e2e_s: Spread | None

    @classmethod
    def of(cls, records: Sequence[RequestRecord]) -> Latencies:
        """Over those of `records` that succeeded."""
        succeeded = [record for record in records if record.is_ok]
        return cls(
            ttft_s=Spread.of(record.ttft_s for record in succeeded),
            itl_s=Spread.of(gap_s for record in succeeded for gap_s in record.itls_s),
            tpot_s=Spread.of(record.tpot_s for record in succeeded),
            e2e_s=Spread.of(record.e2e_s for record in succeeded),
        )

    def to_json(self) -> dict[str, dict[str, float] | None]:
        """By metric, the fields of its Spread."""
        return asdict(self)


def missed_levels(record: RequestRecord, levels: ServiceLevels) -> list[str]:
    """The service levels that a request which succeeded did not keep: of ttft, itl, tpot and e2e."""
    measured: dict[str, tuple[float | None, Callable[[], float | None]]] = {
        "ttft": (levels.ttft_s, lambda: record.ttft_s),
        "itl": (levels.itl_s, lambda: max(record.itls_s, default=None)),
        "tpot": (levels.tpot_s, lambda: record.tpot_s),
        "e2e": (levels.e2e_s, lambda: record.e2e_s),
    }
    return [
        name
        for name, (limit_s, measure) in measured.items()
        if limit_s is not None and (measure() or 0.0) > limit_s
    ]
