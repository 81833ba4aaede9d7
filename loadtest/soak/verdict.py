"""Whether a soak has passed: nothing grew, everything came back, and nobody saw anything wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.samples import (
    FILES,
    HEAP,
    NO_SAMPLE,
    RETURNED,
    RSS,
    TASKS,
    THREADS,
    Sample,
    Samples,
)
from fusionserve.loadtest.soak.traffic import BAD_STATUS, MISMATCH
from fusionserve.loadtest.soak.visitors import FAILED_VISIT

WARM_UP = 1 / 3  # of the time: until then caches, arenas and pools grow to the size they need
ALLOWED_GROWTH: Mapping[str, float] = MappingProxyType(
    {RSS: 20.0, HEAP: 10.0, FILES: 5.0, THREADS: 3.0, TASKS: 20.0}
)
LOG_ERROR, EXIT_CODE = "error in the log", "exit code"
_MOST_POINTS = 1000  # of a slope: it looks at all pairs


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is asked of a soak."""

    name: str
    value: float
    limit: float

    @property
    def is_kept(self) -> bool:
        """True if the value is within the limit."""
        return self.value <= self.limit


def judge(samples: Samples, at_rest: Sample, record: SoakRecord) -> list[Check]:
    """All that is asked."""
    return [
        *(Check(f"growth of {name}", growth(samples, name), most) for name, most in ALLOWED_GROWTH.items()),
        *(Check(f"{name} at rest", at_rest[name], 0) for name in RETURNED),
        *(
            Check(f"problem: {kind}", record.problems[kind], 0)
            for kind in (MISMATCH, BAD_STATUS, FAILED_VISIT, NO_SAMPLE, LOG_ERROR, EXIT_CODE)
        ),
    ]


def growth(samples: Samples, name: str) -> float:
    """How much it grew after the warm-up, by Theil and Sen's slope: peaks that pass do not count."""
    times_s, values = after_warm_up(samples, name)
    return slope(times_s, values) * float(times_s[-1] - times_s[0]) if len(times_s) > 1 else 0.0


def after_warm_up(samples: Samples, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Times and values of the last two thirds."""
    times_s, values = np.array(samples.times_s), np.array(samples.columns[name])
    counted = times_s >= times_s[-1] * WARM_UP
    return times_s[counted], values[counted]


def slope(times_s: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> float:
    """The median of the slopes between all pairs of points, over at most _MOST_POINTS of them."""
    chosen = np.unique(np.linspace(0, len(times_s) - 1, _MOST_POINTS).astype(int))
    x, y = np.asarray(times_s)[chosen], np.asarray(values)[chosen]
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))
