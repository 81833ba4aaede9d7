"""From scores to fusion weights, and from rank rows to scores.

    score_ti = sum_j u_tj g_tj + n_ti          j over the rank rows of member i; u = A x, g = M x + m
    a_ti     = softmax_i(score_ti)             over the members allowed for token t, and the base member (score 0)

Everything here is float32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor


def member_scores(
    u: Tensor, g: Tensor, member_of_row: Tensor, num_members: int, key_scores: Tensor | None
) -> Tensor:
    """Scores [tokens, members] of u, g [tokens, rows]; `member_of_row` [rows] says whose each row is.

    `key_scores` [tokens, members] is the part of the member keys. Sums, not a product with an indicator matrix: one
    member's overflow stays its own.
    """
    products = u.to(_wide(u)) * g.to(_wide(g))
    scores = products.new_zeros(products.shape[0], num_members)
    scores.index_add_(1, member_of_row, products)
    return scores if key_scores is None else scores + key_scores


def masked_softmax(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Softmax over the last axis among the `allowed` entries (None: all).

    Exactly 0 elsewhere, also where none is allowed.
    """
    scores = scores.to(_wide(scores))
    if allowed is None:
        return torch.softmax(scores, dim=-1)
    scores = scores.masked_fill(~allowed, float("-inf"))
    return torch.where(allowed, torch.softmax(scores, dim=-1), 0.0)


def with_base_member(scores: Tensor) -> Tensor:
    """Scores [tokens, members] with the base member's score, 0, behind them."""
    return torch.nn.functional.pad(scores, (0, 1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
