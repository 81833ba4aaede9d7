"""What happened in a soak: how requests and commands ended, what was wrong, and when hostile clients were there."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field

_MOST_PROBLEMS = 100  # kept with their text; all are counted


@dataclass(frozen=True, slots=True)
class Visit:
    """A hostile client's stay, in seconds since the start."""

    kind: str
    since_s: float
    until_s: float


@dataclass(slots=True)
class SoakRecord:
    """Written to by all that go on in a soak."""

    started_s: float = field(default_factory=time.monotonic)
    requests: Counter[str] = field(default_factory=Counter)  # by how they were used and ended
    commands: Counter[str] = field(default_factory=Counter)  # loads and unloads, likewise
    compared_tokens: int = 0
    problems: Counter[str] = field(default_factory=Counter)  # by kind
    texts: list[str] = field(default_factory=list)  # of the first problems
    command_times_s: list[float] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)

    @property
    def now_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started_s

    def note_problem(self, kind: str, text: str) -> None:
        """Counts something that must not happen."""
        self.problems[kind] += 1
        if len(self.texts) < _MOST_PROBLEMS:
            self.texts.append(f"{self.now_s:.1f} s: {kind}: {text}")
