"""One stream of an engine in this process."""

from __future__ import annotations

import time
from contextlib import aclosing

from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.generation import (
    Adaptation,
    GenerateParams,
    GenerationChunk,
    GenerationFinished,
    SamplingParams,
    StoppingCriteria,
    TokenPrompt,
)
from fusionserve.loadtest.bench.drivers.streams import EndedStream

GREEDY = SamplingParams(temperature=0.0)


async def run_stream(engine: AsyncEngine, params: GenerateParams) -> EndedStream:
    """Waits for its end."""
    first_token_s = 0.0
    async with aclosing(engine.generate(params)) as events:
        async for event in events:
            if isinstance(event, GenerationChunk):
                first_token_s = first_token_s or time.monotonic()
            elif isinstance(event, GenerationFinished):
                return EndedStream(first_token_s, list(event.candidates[0].token_ids))
    raise RuntimeError("a stream ended without a result")


def request_params(
    request_id: str,
    prompt: list[int],
    adaptation: Adaptation,
    new_tokens: int,
    sampling: SamplingParams = GREEDY,
) -> GenerateParams:
    """So many tokens, whatever they are."""
    return GenerateParams(
        request_id=request_id,
        prompt=TokenPrompt(tuple(prompt)),
        adaptation=adaptation,
        sampling=sampling,
        stopping=StoppingCriteria(max_new_tokens=new_tokens, ignore_eos=True),
    )
