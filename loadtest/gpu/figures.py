"""What the parts of a run find: one JSON object a line, from their processes to the one that reports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFigure:
    """A device, "cuda" or "cpu", and what it can do at best."""

    type: str
    name: str
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One repeat: seconds of `what`, such as "step_s", in a case."""

    what: str
    case: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFigure:
    """Seconds of one kernel, ours and a library's (None: it has none), and the least it must move and multiply."""

    name: str
    library: str
    ours_s: float
    library_s: float | None
    num_bytes: int
    flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnFigure:
    """A round of all clients, "calm" or "churning"; the 99th percentiles are None where nothing was of the kind."""

    round: str
    tokens_per_s: float
    warm_ttft_s: float | None  # of requests whose adapter was in the pool
    cold_ttft_s: float | None
    warm_itl_s: float | None  # gaps between tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What could not be measured, a part (case: "") or one of its cases, and why, in a line."""

    part: str
    case: str
    error: str


Figure = DeviceFigure | Sample | KernelFigure | ChurnFigure | Failure

_KINDS: dict[str, type[Figure]] = {
    kind.__name__: kind for kind in (DeviceFigure, Sample, KernelFigure, ChurnFigure, Failure)
}


def to_line(figure: Figure) -> str:
    """Without the line's end."""
    return json.dumps({"kind": type(figure).__name__, **asdict(figure)})


def from_line(line: str) -> Figure:
    """The inverse of `to_line`."""
    fields = json.loads(line)
    return _KINDS[fields.pop("kind")](**fields)
