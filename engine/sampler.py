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

from fusionserve.generation import SamplingParams
from fusionserve.kernels.argmax import argmax
from fusionserve.kernels.host_copy import to_device
from fusionserve.kernels.index_tensor import index_tensor
from fusionserve.kernels.token_draw import TokenDraw, draw_tokens
from fusionserve.kernels.token_logprobs import token_logprobs


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What shapes one row: its parameters, the tokens so far, the tokens it may not take, and its random numbers.

    Whose parameters do not change logits needs no tokens.
    """

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

    def first(self, num_top: int) -> Logprobs:
        """The same with no more than so many of the most likely tokens."""
        return Logprobs(self.chosen, self.top[:num_top])


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
    draws = [_to_draw(index, row) for index, row in enumerate(rows) if not row.params.is_greedy]
    if not draws:
        return argmax(logits)
    drawn = draw_tokens(logits, draws)
    if len(draws) == len(rows):
        return drawn
    return argmax(logits).index_copy(
        0, to_device([draw.row for draw in draws], torch.long, logits.device), drawn
    )


def _to_draw(index: int, row: SamplerRow) -> TokenDraw:
    params = row.params
    return TokenDraw(
        index,
        row.uniforms,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
    )


def logprobs_of(
    logits: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int
) -> list[Logprobs]:
    """Log-probabilities of `token_ids`, each in its row of logits [rows, vocab], with the most likely tokens there."""
    found = token_logprobs(logits, rows, token_ids, num_top)
    return [
        Logprobs(
            (token_id, logprob, rank),
            tuple((top_id, value, place) for place, (top_id, value) in enumerate(zip(*top, strict=True), 1)),
        )
        for token_id, logprob, rank, *top in zip(
            token_ids,
            found.logprobs.tolist(),
            found.ranks.tolist(),
            found.top_ids.tolist(),
            found.top.tolist(),
            strict=True,
        )
    ]


def _apply_penalties_(logits: Tensor, row: SamplerRow) -> None:
    """Logit bias, repetition (prompt and output), presence and frequency (output only), bans; on logits [vocab]."""
    params = row.params
    if params.logit_bias:
        logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1.0:
        seen = index_tensor(tuple({*row.prompt_ids, *row.generated_ids}), logits.device)
        values, penalty = logits.index_select(0, seen), params.repetition_penalty
        logits.index_copy_(0, seen, torch.where(values > 0, values / penalty, values * penalty))
    if row.generated_ids and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(row.generated_ids)
        penalties = [params.presence_penalty + params.frequency_penalty * count for count in counts.values()]
        logits.index_add_(0, index_tensor(tuple(counts), logits.device), -logits.new_tensor(penalties))
    if row.banned_ids:
        logits[list(row.banned_ids)] = float("-inf")
