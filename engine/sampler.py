"""Draws the next token of each request from its logits.

Every request is a row of its own: nothing here depends on what else is in the batch, and the random numbers of a row
come from the request (`Request.uniforms`), so the same seed gives the same token in any company.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.engine.host_copy import to_device
from fusionserve.generation import SamplingParams
from fusionserve.kernels.pointwise import argmax

_MIN_TEMPERATURE = 1e-30  # greedy to the last bit, and not rounded to 0 in float32
_TOP_P_TOKENS = 1024  # sorted at first for top-p
_FANOUT = 8  # parts that a range of token ids is split into, one of which is drawn
NUM_UNIFORMS = 7  # splits, at most; enough for 8 ** 7 tokens


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What shapes one row: its parameters, the tokens so far, the tokens it may not take, and its random numbers."""

    params: SamplingParams
    prompt_ids: Sequence[int]
    generated_ids: Sequence[int]
    banned_ids: Sequence[int]
    uniforms: Sequence[float]  # NUM_UNIFORMS in [0, 1); a greedy one needs none


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities at one position under the unmodified distribution: (token, logprob, rank) each."""

    chosen: tuple[int, float, int]
    top: tuple[tuple[int, float, int], ...]


def sample(logits: Tensor, rows: Sequence[SamplerRow]) -> list[int | None]:
    """The next token of each row of logits [rows, vocab]; None where the logits are not finite."""
    return to_tokens(choose(logits, rows))


def to_tokens(drawn: Tensor) -> list[int | None]:
    """The tokens of what `choose` returned; a GPU is waited for, once."""
    return [None if token < 0 else token for token in drawn.tolist()]


def choose(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """The next token of each row of logits [rows, vocab], or -1 where they are not finite.

    A GPU is waited for only if a row changes its logits.
    """
    if any(row.params.changes_logits or row.banned_ids for row in rows):
        logits = logits.to(torch.float32, copy=True)
        for index, row in enumerate(rows):
            _apply_penalties_(logits[index], row)
    tokens = argmax(logits)
    drawn = [index for index, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        places = to_device(drawn, torch.long, logits.device)
        new = _draw(logits.index_select(0, places).float(), [rows[index] for index in drawn])
        is_finite = tokens.index_select(0, places) >= 0
        tokens = tokens.index_copy(0, places, new.masked_fill(~is_finite, -1))
    return tokens


def logprobs_of(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[Logprobs]:
    """Log-probabilities of `token_ids` [rows] under logits [rows, vocab], with the `num_top` most likely tokens."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device)[:, None])
    ranks = (logprobs > chosen).sum(dim=-1) + 1
    values, indices = logprobs.topk(min(num_top, logprobs.shape[-1]), dim=-1)
    return [
        Logprobs(
            (token, value, rank),
            tuple(
                (top_id, top_value, place)
                for place, (top_id, top_value) in enumerate(zip(*top, strict=True), 1)
            ),
        )
        for token, value, rank, *top in zip(
            token_ids, chosen[:, 0].tolist(), ranks.tolist(), indices.tolist(), values.tolist(), strict=True
        )
    ]


def _apply_penalties_(logits: Tensor, row: SamplerRow) -> None:
    """Logit bias, repetition (prompt and output), presence and frequency (output only), bans; on logits [vocab]."""
    params = row.params
    if params.logit_bias:
        logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1.0:
        seen = list({*row.prompt_ids, *row.generated_ids})
        values = logits[seen]
        logits[seen] = torch.where(
            values > 0, values / params.repetition_penalty, values * params.repetition_penalty
        )
    if row.generated_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.generated_ids)
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        logits[list(counts)] -= logits.new_tensor(penalties)
    if row.banned_ids:
        logits[list(row.banned_ids)] = float("-inf")


def _draw(logits: Tensor, rows: Sequence[SamplerRow]) -> Tensor:
    """Token ids [rows] drawn from logits [rows, vocab] after top-k, top-p and min-p.

    Only thresholds come from sorting, so two tokens whose probabilities differ by rounding never swap places.
    """
    params = [row.params for row in rows]
    shifted = logits - logits.max(dim=-1, keepdim=True).values  # so that no temperature overflows
    scaled = shifted / _column([max(p.temperature, _MIN_TEMPERATURE) for p in params], shifted)
    scaled = _keep_top_k(scaled, params)
    probabilities = torch.softmax(scaled, dim=-1)
    probabilities = _keep_top_p(probabilities, params)
    probabilities = _keep_min_p(probabilities, params)
    uniforms = to_device([row.uniforms for row in rows], torch.float64, logits.device)
    return _descend(probabilities.double().cumsum(dim=-1), uniforms)


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


def _keep_top_k(scaled: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Drops logits below the k-th largest of their row; ties with it stay."""
    vocab = scaled.shape[-1]
    limits = [min(p.top_k, vocab) if p.top_k else vocab for p in params]
    largest = max((limit for limit in limits if limit < vocab), default=0)
    if not largest:
        return scaled
    top = scaled.topk(largest, dim=-1).values
    lowest = scaled.new_full((len(params), 1), float("-inf"))
    for index, limit in enumerate(limits):
        if limit < vocab:
            lowest[index] = top[index, limit - 1]
    return scaled.masked_fill(scaled < lowest, float("-inf"))


def _keep_top_p(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches top_p; ties with the last one stay."""
    if all(p.top_p >= 1.0 for p in params):
        return probabilities
    limits = to_device([p.top_p for p in params], torch.float64, probabilities.device)[:, None]
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


def _keep_min_p(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Drops tokens less likely than min_p times the most likely one."""
    if all(p.min_p == 0.0 for p in params):
        return probabilities
    limits = _column([p.min_p for p in params], probabilities)
    lowest = limits * probabilities.max(dim=-1, keepdim=True).values
    return probabilities.masked_fill(probabilities < lowest, 0.0)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """[rows, 1], of the type and device of `like`."""
    return to_device(values, like.dtype, like.device)[:, None]
