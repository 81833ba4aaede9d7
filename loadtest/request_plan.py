"""Which requests a load test sends, and in an open loop when: the same seed gives the same ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fusionserve.client import GenerateOptions
from fusionserve.errors import PreconditionError
from fusionserve.loadtest.catalog import Catalog
from fusionserve.loadtest_config import BLEND, FUSION, LORA, LoadConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRequest:
    """One request before it is sent; `due_s` counts from the start of the run and is None in a closed loop."""

    index: int
    due_s: float | None
    kind: str
    names: tuple[str, ...]  # the adapter, the blend's adapters or the fusion; none for base
    prompt: str | tuple[int, ...]
    output_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stream_interval: int = 1

    def options(self, cache_salt: str) -> GenerateOptions:
        """What the client sends besides the prompt: as many tokens as planned, drawn by a seed of its own.

        Requests share cached prompt tokens with those of the same salt only.
        """
        options = GenerateOptions(
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.index,
            max_new_tokens=self.output_tokens,
            ignore_eos=True,
            stream_interval=self.stream_interval,
            cache_salt=cache_salt,
        )
        if self.kind == LORA:
            options["adapter"] = self.names[0]
        elif self.kind == BLEND:
            options["blend"] = {name: 1 / len(self.names) for name in self.names}
        elif self.kind == FUSION:
            options["fusion"] = self.names[0]
        return options


class Popularity:
    """Draws names, most popular first: the k-th in proportion to 1 / k**s; s = 0 is uniform."""

    def __init__(self, names: Sequence[str], s: float) -> None:
        self._names = names
        self._weights = [k**-s for k in range(1, len(names) + 1)]
        self._cumulative = list(itertools.accumulate(self._weights))

    def draw(self, numbers: random.Random) -> str:
        """One name."""
        return numbers.choices(self._names, cum_weights=self._cumulative)[0]

    def draw_distinct(self, numbers: random.Random, count: int) -> tuple[str, ...]:
        """`count` different names, at most as many as there are: each drawn from those that are left."""
        names, weights, drawn = list(self._names), list(self._weights), []
        for _ in range(count):
            (place,) = numbers.choices(range(len(names)), weights)
            drawn.append(names.pop(place))
            weights.pop(place)
        return tuple(drawn)


def plan_requests(config: LoadConfig, catalog: Catalog) -> Iterator[PlannedRequest]:
    """Requests without end. Each property has random numbers of its own, so that changing one leaves the others.

    Raises PreconditionError, at once, if the file of prompts has none or cannot be read.
    """
    return _plan(config, catalog, _PromptSource(config, catalog))


def _plan(config: LoadConfig, catalog: Catalog, source: _PromptSource) -> Iterator[PlannedRequest]:
    adapters, fusions = (Popularity(names, config.zipf) for names in (catalog.adapters, catalog.fusions))
    kinds, weights = list(catalog.mix), list(catalog.mix.values())
    arrivals, kind_numbers, names, prompts, outputs = (
        random.Random(f"{config.seed} {part}")
        for part in ("arrivals", "kinds", "names", "prompts", "outputs")
    )
    due_s = 0.0
    for index in itertools.count():
        if config.rate is not None:
            due_s += arrivals.expovariate(config.rate)
        kind = kind_numbers.choices(kinds, weights)[0]
        yield PlannedRequest(
            index=index,
            due_s=None if config.rate is None else due_s,
            kind=kind,
            names=_names(kind, adapters, fusions, config.blend_size, names),
            prompt=source.draw(prompts),
            output_tokens=config.output_lengths.draw(outputs),
            temperature=config.temperature,
            top_p=config.top_p,
            stream_interval=config.stream_interval,
        )


def _names(
    kind: str, adapters: Popularity, fusions: Popularity, blend_size: int, numbers: random.Random
) -> tuple[str, ...]:
    if kind == LORA:
        return (adapters.draw(numbers),)
    if kind == BLEND:
        return adapters.draw_distinct(numbers, blend_size)
    return (fusions.draw(numbers),) if kind == FUSION else ()


class _PromptSource:
    """Lines of a file, or random token ids that end no sequence: new ones each time, so no prefix is cached."""

    def __init__(self, config: LoadConfig, catalog: Catalog) -> None:
        self._lengths = config.prompt_lengths
        self._lines: list[str] = []
        if config.prompt_file is not None:
            self._lines = [line for line in _read(config.prompt_file).splitlines() if line.strip()]
            if not self._lines:
                raise PreconditionError(f"{config.prompt_file}: there is no line with a prompt")
        ends = set(catalog.model.eos_token_ids)
        self._token_ids = [token for token in range(catalog.model.vocab_size) if token not in ends]

    def draw(self, numbers: random.Random) -> str | tuple[int, ...]:
        """One prompt."""
        if self._lines:
            return numbers.choice(self._lines)
        return tuple(numbers.choices(self._token_ids, k=self._lengths.draw(numbers)))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise PreconditionError(f"{path}: it is not in UTF-8") from None
    except OSError as error:
        raise PreconditionError(f"{path}: {error.strerror}") from None
