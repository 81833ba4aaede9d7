"""Times what follows the logits: drawing tokens and telling log-probabilities, here and by torch's operations.

    python -P tools/sampling_speed.py

Milliseconds for a step's rows, median of the rounds.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: as the server sets it

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fusionserve.kernels.argmax import argmax
from fusionserve.kernels.token_draw import NUM_UNIFORMS, TokenDraw, draw_tokens, reference_draw_tokens
from fusionserve.kernels.token_logprobs import reference_token_logprobs, token_logprobs

_SHAPES = ((1, 49152), (16, 49152), (8, 151936))
_DRAWS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "temperature 0.7, top-k 40": {"temperature": 0.7, "top_k": 40},
    "temperature 0.7, min-p 0.05": {"temperature": 0.7, "min_p": 0.05},
}
_NUM_TOP = 5
_ROUNDS = 15


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    shapes = [f"{rows} x {vocab:,}" for rows, vocab in _SHAPES]
    print(f"| here / torch, rows x vocabulary | {' | '.join(shapes)} |")
    print(f"| --- |{' ---: |' * len(_SHAPES)}")
    columns = [_times(rows, vocab) for rows, vocab in _SHAPES]
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")


def _times(rows: int, vocab: int) -> dict[str, str]:
    logits = (2.0 * torch.randn(rows, vocab)).bfloat16()
    found = {"greedy": _pair(partial(argmax, logits), lambda: logits.float().max(dim=-1))}
    for name, parameters in _DRAWS.items():
        draws = [_draw(row, parameters) for row in range(rows)]
        found[name] = _pair(
            partial(draw_tokens, logits, draws), partial(reference_draw_tokens, logits, draws)
        )
    asked = logits, range(rows), [random.randrange(vocab) for _ in range(rows)], _NUM_TOP
    telling = partial(token_logprobs, *asked), partial(reference_token_logprobs, *asked)
    found[f"log-probabilities, {_NUM_TOP} others"] = _pair(*telling)
    return found


def _draw(row: int, parameters: dict[str, Any]) -> TokenDraw:
    return TokenDraw(row, tuple(random.random() for _ in range(NUM_UNIFORMS)), **parameters)


def _pair(ours: Callable[[], object], torchs: Callable[[], object]) -> str:
    return f"{_median_ms(ours):.2f} / {_median_ms(torchs):.2f}"


@torch.inference_mode()
def _median_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - start_s)
    return statistics.median(times) * 1e3


if __name__ == "__main__":
    main()
