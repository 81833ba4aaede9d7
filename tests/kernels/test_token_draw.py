"""Drawing tokens: the native kernel against torch's operations, and both against the definition in float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.token_draw import (
    NUM_UNIFORMS,
    TokenDraw,
    _most_likely,
    draw_tokens,
    reference_draw_tokens,
)

Drawing = Callable[[Tensor, Sequence[TokenDraw]], Tensor]

PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.2},
    "hot": {"temperature": 40.0},
    "top_1": {"top_k": 1},
    "top_k": {"top_k": 50},
    "most": {"top_k": 40_000},
    "top_p": {"top_p": 0.9},
    "nearly_all": {"top_p": 0.999999},
    "few": {"top_p": 1e-9},
    "min_p": {"min_p": 0.05},
    "usual": {"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.01},
    "hot_and_cut": {"temperature": 30.0, "top_k": 5000, "top_p": 0.5},
}
VOCABS = (1, 5, 16, 17, 512, 513, 4097, 49_152)
KINDS = ("normal", "flat", "peaked", "banned")


def make_logits(kind: str, rows: int, vocab: int, seed: int = 0) -> Tensor:
    logits = 2.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    if kind == "flat":
        logits = (logits / 2000).round(decimals=3)  # many ties
    elif kind == "peaked":
        logits[:, vocab // 3] = 60.0
    elif kind == "banned":
        logits[:, ::2] = -math.inf
        logits[:, 0] = 0.0
    return logits


def random_uniforms(rows: int, seed: int = 0) -> list[list[float]]:
    numbers: list[list[float]] = np.random.default_rng(seed).random((rows, NUM_UNIFORMS)).tolist()
    return numbers


def kept_tokens(logits: Tensor, draw: TokenDraw) -> np.ndarray:
    """Which tokens may be drawn, by the definition, ties with the last one included."""
    scaled = logits.double().numpy() / draw.temperature
    p = np.exp(scaled - scaled.max())
    if draw.top_k and draw.top_k < len(p):
        p[p < np.sort(p)[-draw.top_k]] = 0
    p /= p.sum()
    ordered = -np.sort(-p)
    if draw.top_p < 1:
        num_kept = max(1, int(((np.cumsum(ordered) - ordered) < draw.top_p).sum()))
        p[p < ordered[num_kept - 1]] = 0
    return np.asarray((p > 0) & (p >= draw.min_p * p.max()))


def test_there_is_a_native_kernel() -> None:
    assert native_library() is not None, "what follows would compare the reference with itself"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_the_kernel_draws_what_torch_draws(name: str, vocab: int, kind: str) -> None:
    """Logits whose cuts and sums differ by rounding may give another token, one in thousands."""
    num_rows = 24
    logits = make_logits(kind, num_rows, vocab)
    draws = [TokenDraw(row, u, **PARAMETERS[name]) for row, u in enumerate(random_uniforms(num_rows))]
    expected = reference_draw_tokens(logits, draws)
    found = draw_tokens(logits, draws)
    assert int((found != expected).sum()) <= 1
    for row, token in enumerate(found.tolist()):
        assert kept_tokens(logits[row], draws[row])[token] or token == expected[row]


@pytest.mark.parametrize("drawing", [draw_tokens, reference_draw_tokens])
@pytest.mark.parametrize("name", PARAMETERS)
def test_kept_tokens_are_drawn_as_often_as_they_should(name: str, drawing: Drawing) -> None:
    num_draws, vocab = 6000, 300
    logits = make_logits("normal", 1, vocab, seed=3)
    draws = [TokenDraw(0, u, **PARAMETERS[name]) for u in random_uniforms(num_draws, seed=1)]
    observed = np.bincount(drawing(logits, draws).numpy(), minlength=vocab)
    is_kept = kept_tokens(logits[0], draws[0])
    assert not observed[~is_kept].any()
    weights = np.exp(logits[0].double().numpy() / draws[0].temperature) * is_kept
    expected = num_draws * weights / weights.sum()
    frequent = expected >= 5
    statistic = float((((observed - expected) ** 2) / np.maximum(expected, 1e-9))[frequent].sum())
    freedom = max(1, int(frequent.sum()) - 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("drawing", [draw_tokens, reference_draw_tokens])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_that_is_not_finite_draws_none(bad: float, drawing: Drawing) -> None:
    logits = make_logits("normal", 4, 1000)
    draws = [TokenDraw(row, u, top_p=0.9) for row, u in enumerate(random_uniforms(4))]
    clean = drawing(logits, draws)
    logits[1, 999] = bad
    logits[2] = -math.inf
    assert drawing(logits, draws).tolist() == [clean[0], -1, -1, clean[3]]


def test_rows_are_drawn_in_the_order_asked_for() -> None:
    logits = make_logits("normal", 5, 700)
    uniforms = random_uniforms(5)
    alone = [draw_tokens(logits, [TokenDraw(row, uniforms[row])]).item() for row in range(5)]
    some = [4, 1, 1, 0]
    assert draw_tokens(logits, [TokenDraw(row, uniforms[row]) for row in some]).tolist() == [
        alone[row] for row in some
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounded_logits_draw_as_the_same_numbers_in_float32(dtype: torch.dtype) -> None:
    logits = make_logits("normal", 40, 2000).to(dtype)
    draws = [TokenDraw(row, u, **PARAMETERS["usual"]) for row, u in enumerate(random_uniforms(40))]
    assert draw_tokens(logits, draws).tolist() == draw_tokens(logits.float(), draws).tolist()


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 1 - 2.0**-53])
@pytest.mark.parametrize("name", PARAMETERS)
def test_extreme_random_numbers_draw_the_first_and_the_last_kept_token(name: str, uniform: float) -> None:
    logits = make_logits("banned", 1, 5000, seed=8)
    draw = TokenDraw(0, [uniform] * NUM_UNIFORMS, **PARAMETERS[name])
    kept = np.flatnonzero(kept_tokens(logits[0], draw))
    assert draw_tokens(logits, [draw]).item() == (kept[-1] if uniform > 0.5 else kept[0])


@pytest.mark.parametrize("name", PARAMETERS)
def test_drawing_never_looks_at_what_a_device_has_computed(name: str) -> None:
    """Tensors without numbers cannot be looked at, and on a GPU whoever looks waits for it."""
    uniforms = random_uniforms(2)
    draws = [TokenDraw(0, uniforms[0], **PARAMETERS[name]), TokenDraw(1, uniforms[1], top_p=0.9)]
    tokens = draw_tokens(make_logits("normal", 2, 60_000).to("meta"), draws)
    assert tokens.shape == (2,) and tokens.device.type == "meta"


def test_a_device_sorts_what_a_processor_searches_first() -> None:
    probabilities = torch.softmax(make_logits("normal", 2, 3000), dim=-1)
    limits = torch.tensor([[0.5], [0.9]], dtype=torch.float64)
    assert _most_likely(probabilities, limits).shape[1] < 3000
    assert _most_likely(probabilities.to("meta"), limits.to("meta")).shape[1] == 3000
