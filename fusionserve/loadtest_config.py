"""Frozen configuration of a load test: what `fusionserve loadtest` and the scenarios of `loadtest/` ask for."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

BASE, LORA, BLEND, FUSION = KINDS = ("base", "lora", "blend", "fusion")
LENGTH_FORMS = "N, LOW..HIGH or lognormal:MEDIAN:SIGMA:MAX"


@dataclass(frozen=True, slots=True)
class UniformLengths:
    """Every number of tokens from `low` to `high` is as likely; one number if they are equal."""

    low: int
    high: int

    @property
    def largest(self) -> int:
        """No draw is above it."""
        return self.high

    def draw(self, numbers: random.Random) -> int:
        """A number of tokens."""
        return numbers.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class LognormalLengths:
    """Half of the lengths are below `median`; `sigma` is the deviation of their logarithm.

    Below 1 is 1. A draw above `largest` is drawn again, so the distribution is cut off there, not piled up.
    """

    median: int
    sigma: float
    largest: int

    def draw(self, numbers: random.Random) -> int:
        """A number of tokens."""
        while True:
            tokens = max(1, round(self.median * numbers.lognormvariate(0.0, self.sigma)))
            if tokens <= self.largest:
                return tokens

    def __str__(self) -> str:
        return f"lognormal:{self.median}:{self.sigma:g}:{self.largest}"


Lengths = UniformLengths | LognormalLengths


def parse_lengths(text: str) -> Lengths:
    """The distribution of 128, 16..256 or lognormal:128:0.7:1024. Raises ValueError with the reason."""
    try:
        name, *parts = text.split(":")
        if parts:
            median, sigma, largest = int(parts[0]), float(parts[1]), int(parts[2])
            if name != "lognormal" or len(parts) != 3 or not (1 <= median <= largest and 0 <= sigma <= 10):
                raise ValueError
            return LognormalLengths(median, sigma, largest)
        low, dots, high = text.partition("..")
        lengths = UniformLengths(int(low), int(high if dots else low))
        if not 1 <= lengths.low <= lengths.high:
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"{text!r} is not {LENGTH_FORMS}") from None
    return lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceLevels:
    """What a request must keep to count as goodput, in seconds; None: anything will do.

    `itl_s` bounds the longest gap between two tokens of a request, `tpot_s` their mean.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """A load test of the server at `target`.

    Open loop with a `rate`: requests arrive by a Poisson process and do not wait for each other; one that would be
    the (`max_in_flight` + 1)th is not sent. Closed loop without: `concurrency` streams, each sends its next request
    when the one before has ended. The first `warm_up` requests are sent but not counted. The run ends with
    `num_requests` counted ones or `duration_s` after the first of them, whichever comes first; None: no such limit.
    """

    target: str
    timeout_s: float | None = None  # of each request
    rate: float | None = None  # requests/s
    concurrency: int = 8
    max_in_flight: int = 512
    num_requests: int | None = None
    duration_s: float | None = None
    warm_up: int = 0
    seed: int = 0
    mix: Mapping[str, float] = field(
        default_factory=dict
    )  # weights of kinds; empty: all the server has, equally
    adapters: tuple[str, ...] = ()  # most popular first; empty: all that the server lists
    fusions: tuple[str, ...] = ()
    zipf: float = 0.0  # the k-th most popular one is drawn in proportion to 1 / k**zipf
    blend_size: int = 2
    prompt_lengths: Lengths = UniformLengths(64, 64)
    output_lengths: Lengths = UniformLengths(32, 32)
    prompt_file: Path | None = None  # its lines are the prompts, instead of random token ids
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    stream_interval: int = 1  # tokens in a message, at least
    service_levels: ServiceLevels = ServiceLevels()

    @property
    def streams(self) -> str:
        """How requests arrive, in words."""
        if self.rate is None:
            return f"closed loop of {self.concurrency} streams"
        return f"open loop at {self.rate:g} requests/s"
