"""Scores held-out text on a base held in all bits and in fewer, and prints by how much the log-probabilities differ.

    python -P tools/quantization_error.py                  the embedded base, on the text that it ships with
    python -P tools/quantization_error.py --model DIR      another one, on the same text

Differences are those of the tokens that the text has, to the base in float32; `same best` is the share of positions
whose most likely token is the same; perplexity is over all positions.
"""

from __future__ import annotations

import argparse
import asyncio
import math
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers.utils.logging import set_verbosity_error

from fusionserve.config import EMBEDDED, EMBEDDED_MODEL, EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.generation import (
    GenerateParams,
    GenerationFinished,
    OutputOptions,
    StoppingCriteria,
    TextPrompt,
    TokenPrompt,
)
from fusionserve.metrics import AdapterLabels

Array = npt.NDArray[np.float64]

_WAYS = (("none", "float32"), ("none", "bfloat16"), ("int8", "float32"), ("int8", "bfloat16"))
_WAYS += (("int4", "float32"), ("int4", "bfloat16"), ("nf4", "float32"), ("nf4", "bfloat16"))
_WINDOW = 256
_WINDOWS_PER_TEXT = 8


@dataclass(frozen=True, slots=True)
class Scores:
    """What a base says of the texts: for every token but the first of each window."""

    weight_bytes: int
    logprobs: Array
    best_tokens: Array


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EMBEDDED_MODEL)
    model = parser.parse_args().model
    set_verbosity_error()  # type: ignore[no-untyped-call] # it warns of texts longer than a context
    full: Scores | None = None
    print("| weights | `--dtype` | MiB | mean difference | 99 % are under | same best | perplexity |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for quantize, dtype in _WAYS:
        scores = asyncio.run(_score(model, quantize, dtype))
        full = full or scores
        differences = np.abs(scores.logprobs - full.logprobs)
        same = float((scores.best_tokens == full.best_tokens).mean())
        print(
            f"| {quantize} | {dtype} | {scores.weight_bytes / 2**20:,.1f} | {differences.mean():.4f} "
            f"| {np.quantile(differences, 0.99):.3f} | {same:.1%} | {math.exp(-scores.logprobs.mean()):.3f} |",
            flush=True,
        )


async def _score(model: Path, quantize: str, dtype: str) -> Scores:
    config = EngineConfig(model=str(model), model_name="base", dtype=dtype, quantize=quantize)
    engine = AsyncEngine.load(config, AdapterLabels(1))
    await engine.start()
    try:
        texts = sorted((EMBEDDED / "heldout").glob("*.txt"))
        windows = [window for path in texts for window in await _windows(engine, path)]
        scored = await asyncio.gather(*(_score_window(engine, str(n), w) for n, w in enumerate(windows)))
        rows = np.concatenate(scored)
        return Scores(engine.model_info().weight_bytes, rows[:, 0], rows[:, 1])
    finally:
        await engine.close()


async def _windows(engine: AsyncEngine, path: Path) -> list[tuple[int, ...]]:
    token_ids = await engine.tokenize(TextPrompt(path.read_text()), add_special_tokens=False)
    starts = range(0, len(token_ids) - _WINDOW, _WINDOW)[:_WINDOWS_PER_TEXT]
    return [tuple(token_ids[start : start + _WINDOW]) for start in starts]


async def _score_window(engine: AsyncEngine, request_id: str, window: tuple[int, ...]) -> Array:
    """(log-probability, best token) [positions, 2]."""
    params = GenerateParams(
        request_id=request_id,
        prompt=TokenPrompt(window),
        stopping=StoppingCriteria(max_new_tokens=1),
        output=OutputOptions(prompt_logprobs=1),
    )
    async with aclosing(engine.generate(params)) as events:
        async for event in events:
            if isinstance(event, GenerationFinished):
                rows = [(row.chosen.logprob, row.top[0].token_id) for row in event.prompt_logprobs]
                return np.array(rows)
    raise RuntimeError("a window ended without a result")


if __name__ == "__main__":
    main()
