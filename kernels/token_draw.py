"""The next token of a row of logits, drawn by temperature, top-k, top-p and min-p.

Natively where there is a library and the type is float32 or bfloat16 (`native/token_draw.cpp`), in one pass over the
logits for each of: the largest, the weights by bins, the kept weights by blocks. Else with torch's operations, which
sort: for 16 rows of 49,152 tokens that takes longer than a model of 135M parameters.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.host_copy import to_device
from fusionserve.kernels.native_call import native_function

NUM_UNIFORMS = 7  # splits, at most; enough for 8 ** 7 tokens
_FANOUT = 8  # parts that a range of token ids is split into, one of which is drawn
_TOP_P_TOKENS = 1024  # sorted at first for top-p
_MIN_TEMPERATURE = 1e-30  # greedy to the last bit, and not rounded to 0 in float32


@dataclass(frozen=True, slots=True)
class TokenDraw:
    """How the token after a row of the logits is drawn."""

    row: int
    uniforms: Sequence[float]  # NUM_UNIFORMS random numbers in [0, 1)
    temperature: float = 1.0  # over 0
    top_k: int = 0  # 0: all tokens
    top_p: float = 1.0
    min_p: float = 0.0


class _NativeDraw(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("row", "top_k")),
        *((name, c_double) for name in ("temperature", "top_p", "min_p")),
        ("uniforms", c_double * NUM_UNIFORMS),
    )


def draw_tokens(logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Token ids [draws] from logits [rows, vocab]; -1 where the largest logit is not finite or one is NaN.

    Ties with the last token that top-k or top-p keeps are kept too. Only cuts come from comparing probabilities, so two
    tokens whose probabilities differ by rounding never swap places.
    """
    native = native_function("draw_tokens", logits)
    if native is None:
        return reference_draw_tokens(logits, draws)
    logits = logits.contiguous()
    assert all(0 <= draw.row < len(logits) and len(draw.uniforms) == NUM_UNIFORMS for draw in draws)
    assert 0 < logits.shape[1] <= _FANOUT**NUM_UNIFORMS
    tokens = torch.empty(len(draws), dtype=torch.long)
    entries = (_NativeDraw * len(draws))(*map(_to_native, draws))
    pointers = c_void_p(logits.data_ptr()), c_int64(logits.shape[1]), entries
    native(*pointers, c_int64(len(draws)), c_void_p(tokens.data_ptr()))
    return tokens


def _to_native(draw: TokenDraw) -> _NativeDraw:
    temperature = max(draw.temperature, _MIN_TEMPERATURE)
    return _NativeDraw(draw.row, draw.top_k, temperature, draw.top_p, draw.min_p, tuple(draw.uniforms))


def reference_draw_tokens(logits: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """The definition, in float32; a GPU is not waited for."""
    rows = to_device([draw.row for draw in draws], torch.long, logits.device)
    logits = logits.index_select(0, rows).float()
    largest = logits.max(dim=-1, keepdim=True).values
    shifted = logits - largest  # so that no temperature overflows
    scaled = shifted / _column([max(draw.temperature, _MIN_TEMPERATURE) for draw in draws], shifted)
    scaled = _keep_top_k(scaled, draws)
    probabilities = torch.softmax(scaled, dim=-1)
    probabilities = _keep_top_p(probabilities, draws)
    probabilities = _keep_min_p(probabilities, draws)
    uniforms = to_device([draw.uniforms for draw in draws], torch.float64, logits.device)
    tokens = _descend(probabilities.double().cumsum(dim=-1), uniforms)
    return tokens.masked_fill(~largest[:, 0].isfinite(), -1)


def _descend(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Token ids [rows] by cumulative probabilities [rows, vocab] and uniforms [rows, NUM_UNIFORMS].

    Splits the range of ids again and again and draws each part by a number of its own. A single number, compared with
    all of `cumulative`, would give a neighbour as soon as rounding moved one of its many steps past the number: with
    150,000 tokens once in a thousand draws, where this is once in a million.
    """
    cumulative = torch.nn.functional.pad(cumulative, (1, 0))
    vocab = cumulative.shape[-1] - 1
    num_levels = next(level for level in range(NUM_UNIFORMS + 1) if _FANOUT**level >= vocab)
    parts = torch.arange(_FANOUT + 1, device=cumulative.device)
    first = parts.new_zeros(len(cumulative), 1)
    for level in range(num_levels):
        width = _FANOUT ** (num_levels - 1 - level)
        bounds = cumulative.gather(1, (first + width * parts).clamp(max=vocab))
        ends = bounds[:, 1:] - bounds[:, :1]
        targets = (
            uniforms[:, level, None] * ends[:, -1:]
        )  # less than the last end, so a part of zero is never drawn
        first = first + width * torch.searchsorted(ends, targets, right=True)
    return first[:, 0].clamp(max=vocab - 1)  # rows that are not finite may be anywhere


def _keep_top_k(scaled: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Drops logits below the k-th largest of their row; ties with it stay."""
    vocab = scaled.shape[-1]
    limits = [min(draw.top_k, vocab) if draw.top_k else vocab for draw in draws]
    largest = max((limit for limit in limits if limit < vocab), default=0)
    if not largest:
        return scaled
    top = scaled.topk(largest, dim=-1).values
    lowest = scaled.new_full((len(draws), 1), float("-inf"))
    for index, limit in enumerate(limits):
        if limit < vocab:
            lowest[index] = top[index, limit - 1]
    return scaled.masked_fill(scaled < lowest, float("-inf"))


def _keep_top_p(probabilities: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches top_p; ties with the last one stay."""
    if all(draw.top_p >= 1.0 for draw in draws):
        return probabilities
    limits = to_device([draw.top_p for draw in draws], torch.float64, probabilities.device)[:, None]
    ordered = _most_likely(probabilities, limits)
    before = ordered.double().cumsum(dim=-1) - ordered
    num_kept = (before < limits).sum(dim=-1, keepdim=True).clamp(min=1)
    lowest = ordered.gather(1, num_kept - 1)
    unlimited = limits >= 1.0
    return probabilities.masked_fill((probabilities < lowest) & ~unlimited, 0.0)


def _most_likely(probabilities: Tensor, limits: Tensor) -> Tensor:
    """The largest probabilities of each row in descending order, enough of them to reach the row's limit.

    A set of a thousand tokens nearly always does, and finding it costs a twentieth of sorting 150,000. A GPU sorts: to
    ask whether they do is to wait for it in the middle of its work.
    """
    if probabilities.device.type != "cpu":
        return probabilities.sort(dim=-1, descending=True).values
    likely = probabilities.topk(min(_TOP_P_TOKENS, probabilities.shape[-1]), dim=-1).values
    is_enough = (likely.double().sum(dim=-1, keepdim=True) >= limits) | (limits >= 1.0)
    return likely if bool(is_enough.all()) else probabilities.sort(dim=-1, descending=True).values


def _keep_min_p(probabilities: Tensor, draws: Sequence[TokenDraw]) -> Tensor:
    """Drops tokens less likely than min_p times the most likely one."""
    if all(draw.min_p == 0.0 for draw in draws):
        return probabilities
    limits = _column([draw.min_p for draw in draws], probabilities)
    lowest = limits * probabilities.max(dim=-1, keepdim=True).values
    return probabilities.masked_fill(probabilities < lowest, 0.0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[rows, 1], of the type and device of `like`."""
    return to_device(values, like.dtype, like.device)[:, None]
