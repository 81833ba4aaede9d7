"""Rounds of several systems in turn: every repeat runs each kind on each system, and every other one backwards."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fusionserve.loadtest.bench.protocol import KINDS, Job, Outcome
from fusionserve.loadtest.bench.system_process import SystemFailedError
from fusionserve.loadtest.bench.workloads import BenchWorkload

_PAUSE_S = 0.3  # until the last system's threads no longer spin


class Running(Protocol):
    """A system that is up."""

    def run(self, job: Job) -> Outcome:
        """One round."""
        ...


@dataclass(frozen=True, slots=True)
class Contestant:
    """A running system and the kinds of round it can run."""

    process: Running
    kinds: tuple[str, ...]


@dataclass(slots=True)
class Rounds:
    """Outcomes by (system, kind), one per measured repeat, and the systems that fell out with the reason."""

    outcomes: dict[tuple[str, str], list[Outcome]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def take_turns(
    contestants: Mapping[str, Contestant],
    workload: BenchWorkload,
    repeats: int,
    between: Callable[[int], None],
) -> Rounds:
    """One unmeasured repeat, then `repeats` measured ones; `between` is called before each with its number.

    A system that fails is left out from then on, and so are its rounds: a median needs all of them.
    """
    rounds = Rounds()
    for repeat in range(repeats + 1):
        between(repeat)
        for name, kind in _order(contestants, repeat):
            if name in rounds.failures:
                continue
            try:
                outcome = _run(contestants[name].process, workload, kind, repeat)
            except SystemFailedError as error:
                rounds.failures[name] = f"{kind}: {error}"
                continue
            if repeat:
                rounds.outcomes.setdefault((name, kind), []).append(outcome)
    rounds.outcomes = {key: each for key, each in rounds.outcomes.items() if key[0] not in rounds.failures}
    return rounds


def _order(contestants: Mapping[str, Contestant], repeat: int) -> Sequence[tuple[str, str]]:
    turns = [(name, kind) for kind in KINDS for name, each in contestants.items() if kind in each.kinds]
    return turns[::-1] if repeat % 2 else turns


def _run(process: Running, workload: BenchWorkload, kind: str, repeat: int) -> Outcome:
    """The prompts of a kind and repeat are the same for every system, and nobody has seen them before."""
    time.sleep(_PAUSE_S)
    return process.run(Job(kind, workload.prompts(f"{repeat} {kind}"), workload.new_tokens))
