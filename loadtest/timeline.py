"""Throughput and requests in flight over the time of a load test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.request_record import RequestRecord

FloatArray = npt.NDArray[np.float64]

MAX_BINS = 80
_STEPS_S = (0.25, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """Bins of about `step_s` between neighbouring `edges_s`, which count from the start of the measured window.

    What happens to requests of the warm-up within the window is in them, too.
    """

    step_s: float
    edges_s: list[float]  # one more than there are bins
    generated_tokens_per_s: list[float]  # whether or not their request succeeded in the end
    requests_per_s: list[float]  # that ended in the bin
    failed_per_s: list[float]
    in_flight: list[int]  # the most at one time within the bin


def timeline(outcome: Outcome) -> Timeline:
    """Of the measured window, which must not be empty."""
    start_s, end_s = outcome.window_s
    step_s = next((step for step in _STEPS_S if (end_s - start_s) / step <= MAX_BINS), _STEPS_S[-1])
    edges = _edges(start_s, end_s, step_s)
    records = outcome.records
    chunks = [chunk for record in records for chunk in record.chunks]
    return Timeline(
        step_s=step_s,
        edges_s=[round(float(edge - start_s), 6) for edge in edges],
        generated_tokens_per_s=_rates([at_s for at_s, _ in chunks], edges, [count for _, count in chunks]),
        requests_per_s=_rates([record.ended_s for record in records], edges),
        failed_per_s=_rates([record.ended_s for record in records if not record.is_ok], edges),
        in_flight=_most_in_flight(records, edges.tolist()),
    )


def _edges(start_s: float, end_s: float, step_s: float) -> FloatArray:
    """Multiples of `step_s`; what is left at the end is a shorter bin, or joins the last one if under half of it."""
    edges = np.arange(start_s, end_s, step_s)
    if len(edges) > 1 and end_s - edges[-1] < step_s / 2:
        edges = edges[:-1]
    return np.append(edges, end_s)


def _rates(times_s: Sequence[float], edges: FloatArray, counts: Sequence[int] | None = None) -> list[float]:
    """Events per second in each bin, each event counted as often as `counts` says."""
    totals, _ = np.histogram(times_s, edges, weights=counts)
    return [float(rate) for rate in totals / np.diff(edges)]


def _most_in_flight(records: Sequence[RequestRecord], edges: Sequence[float]) -> list[int]:
    """By bin; an end at the same moment as a start comes first."""
    changes = sorted(
        [(record.sent_s, 1) for record in records] + [(record.ended_s, -1) for record in records]
    )
    most, current, position = [], 0, 0
    for edge in edges:  # the first is where the warm-up ends, and the first bin begins
        highest = current
        while position < len(changes) and changes[position][0] <= edge:
            current += changes[position][1]
            highest = max(highest, current)
            position += 1
        most.append(highest)
    return most[1:]
