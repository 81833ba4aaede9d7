"""Rounds of concurrent streams: every stream a new prompt and its own adaptation, all started at once."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fusionserve.client import AsyncClient, GenerateOptions, Generation, GenerationChunk

_PROMPT_TOKEN_IDS = range(1000, 40000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Concurrent streams of equal prompt and output length."""

    num_streams: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Round:
    """How long one round took, and how much of it until the last stream had its first token."""

    num_generated: int
    prompt_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens by the time of the whole round."""
        return self.num_generated / self.total_s

    @property
    def decode_s(self) -> float:
        """Time after the last prompt: every stream decodes, one token per step, until its end."""
        return self.total_s - self.prompt_s


async def measure_rounds(
    client: AsyncClient, workload: Workload, kinds: Mapping[str, Sequence[GenerateOptions]], repeats: int
) -> dict[str, list[Round]]:
    """`repeats` rounds of every kind, the kinds in turn, after one unmeasured round of each.

    A kind lists adaptations; its streams take them in turn.
    """
    rounds: dict[str, list[Round]] = {kind: [] for kind in kinds}
    for repeat in range(repeats + 1):
        for kind, adaptations in kinds.items():
            measured = await _run(client, workload, adaptations, random.Random(f"{repeat} {kind}"))
            if repeat:
                rounds[kind].append(measured)
    return rounds


def median_ratio(over: Sequence[Round], under: Sequence[Round]) -> float:
    """Tokens/s of `over` by those of `under`, each within its repeat: the median of these."""
    pairs = zip(over, under, strict=True)
    return statistics.median(mine.tokens_per_s / theirs.tokens_per_s for mine, theirs in pairs)


async def _run(
    client: AsyncClient, workload: Workload, adaptations: Sequence[GenerateOptions], numbers: random.Random
) -> Round:
    """One round; its prompts are new, so nothing comes from the prefix cache."""
    prompts = [
        [numbers.choice(_PROMPT_TOKEN_IDS) for _ in range(workload.prompt_tokens)]
        for _ in range(workload.num_streams)
    ]
    started_s = time.monotonic()
    ended = await asyncio.gather(
        *(
            _drain(client, prompt, workload.new_tokens, adaptations[index % len(adaptations)])
            for index, prompt in enumerate(prompts)
        )
    )
    total_s = time.monotonic() - started_s
    prompt_s = max(first_token_s for first_token_s, _ in ended) - started_s
    return Round(sum(num_tokens for _, num_tokens in ended), prompt_s, total_s)


async def _drain(
    client: AsyncClient, prompt: Sequence[int], new_tokens: int, adaptation: GenerateOptions
) -> tuple[float, int]:
    """Streams one request to its end; returns the time of its first token and the number of all."""
    length: GenerateOptions = {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    options: GenerateOptions = {**adaptation, **length}
    first_token_s: float | None = None
    num_tokens = 0
    async for event in client.stream(prompt, **options):
        if isinstance(event, GenerationChunk) and first_token_s is None:
            first_token_s = time.monotonic()
        elif isinstance(event, Generation):
            num_tokens = event.usage.generated_tokens
    assert first_token_s is not None, "a stream gave no token"
    return first_token_s, num_tokens
