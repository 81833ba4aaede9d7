"""What the runner and a system's process say to each other: one JSON object per line, on its standard streams.

The process is started with nothing but the module to run. It is sent a `Setup` and answers `{"ready": versions}`, then
any number of `Job`s, each answered by an `Outcome`; the end of its input ends it. Anything that goes wrong is answered
by `{"error": text}`. This module needs the standard library only, because every peer's environment imports it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TextIO

KINDS = BASE, MIXED, FUSION, SAMPLED = "base", "mixed", "fusion", "sampled"
TEMPERATURE, TOP_P = 0.7, 0.9  # of a sampled round; the others are greedy


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The files and sizes of a run; `options` is for the one system alone."""

    model: str
    adapters: Sequence[str]
    fusion: str
    num_streams: int
    prompt_tokens: int
    new_tokens: int
    rank: int
    kv_bytes_per_token: int
    num_threads: int
    options: dict[str, str] = field(default_factory=dict)

    @property
    def tokens_per_stream(self) -> int:
        """The context a stream has reached when its last token is there."""
        return self.prompt_tokens + self.new_tokens

    def adapter_of(self, stream: int) -> int:
        """The adapter that a stream of a mixed round uses."""
        return stream % len(self.adapters)


@dataclass(frozen=True, slots=True)
class Job:
    """One round: every prompt is a stream, all start at once, `new_tokens` each and no end of sequence."""

    kind: str  # BASE, SAMPLED: no adapter; MIXED: stream n has its own; FUSION: all have the fusion
    prompts: Sequence[Sequence[int]]
    new_tokens: int

    @property
    def temperature(self) -> float:
        """Of its draws; 0 is greedy."""
        return TEMPERATURE if self.kind == SAMPLED else 0.0

    @property
    def top_p(self) -> float:
        """Of its draws."""
        return TOP_P if self.kind == SAMPLED else 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds until the last stream had its first token and until all were done, and what was generated.

    `prompt_s` is None where a round has no such parting: streams that wait for others' last tokens.
    """

    prompt_s: float | None
    total_s: float
    token_ids: Sequence[Sequence[int]]  # [streams][new_tokens]


class Driver(Protocol):
    """A system that holds its model and runs rounds of it."""

    versions: dict[str, str]

    def run(self, job: Job) -> Outcome:
        """Runs one round to its end."""
        ...

    def close(self) -> None:
        """Ends what the system started."""
        ...


def answer_jobs(load: Callable[[Setup], Driver]) -> None:
    """The main function of a system's process."""
    requests, answers = sys.stdin, own_standard_output()
    try:
        driver = load(Setup(**json.loads(requests.readline())))
        _say(answers, {"ready": driver.versions})
        try:
            for line in requests:
                _say(answers, asdict(driver.run(Job(**json.loads(line)))))
        finally:
            driver.close()
    except Exception as error:
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        raise


def own_standard_output() -> TextIO:
    """The stream to the runner; what libraries print goes to standard error from here on."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()
