"""Results of single runs, kept in files: an experiment that was interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one system came to with one seed."""

    system: str
    seed: int
    losses: Mapping[str, float]  # nats per token, by text
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # by text, then by member
    trained: int = 0  # parameters
    seconds: float = 0.0  # of training


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and standard deviation over seeds."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.deviation:.2f}" if self.deviation else "")


class Results:
    """A folder with a file for every result. `shared` is what all of them depend on."""

    def __init__(self, folder: Path, shared: Mapping[str, object]) -> None:
        self._folder = folder
        self._shared = shared
        folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, system: str, seed: int, make: Callable[[], Result], own: Mapping[str, object] | None = None
    ) -> Result:
        """The result that is there, if it was made with the same settings, shared and its own; else a fresh one."""
        settings = json.loads(json.dumps({"shared": self._shared, "own": own}))
        path = self._folder / f"{system.replace(' ', '_').replace(',', '')}-{seed}.json"
        if path.is_file():
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["settings"] == settings:
                return Result(**stored["result"])
        result = make()
        fields = {"settings": settings, "result": asdict(result)}
        path.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
        return result


def spread(values: Sequence[float]) -> Spread:
    """Over the seeds; a single one has no spread."""
    return Spread(mean(values), stdev(values) if len(values) > 1 else 0.0)
