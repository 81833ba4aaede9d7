"""Shrink and expand, the two products every adapted token pays (section 1 of the design):

    u_t = A x_t + a0                  shrink   [rows]
    y_t = y_t + sum_j c_tj u_tj B_j   expand   j over rank rows; scaling is already inside B

`c` is 0 for rank rows that are not the token's own, so one product serves tokens of different adapters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def shrink(x: Tensor, shrink_rows: Tensor, shrink_bias: Tensor | None) -> Tensor:
    """u = x A^T + a0 for x [tokens, d_in], A [rows, d_in], a0 [rows] or None for zeros; returns [tokens, rows]."""
    return functional.linear(x, shrink_rows, shrink_bias)


def shrink_embedding(token_ids: Tensor, shrink_rows: Tensor, shrink_bias: Tensor) -> Tensor:
    """u = A[:, ids]^T + a0, the shrink of one-hot inputs, for ids [tokens] and A [rows, vocab]."""
    return shrink_rows.index_select(1, token_ids).T + shrink_bias


def weigh_(u: Tensor, coefficients: Tensor, left_out: Tensor | None) -> Tensor:
    """u = c * u, in place, and exactly zero where `left_out` even if that u is infinite; returns u.

    That keeps one adapter's overflow out of its neighbours' tokens. `coefficients` may be wider than u, and is like
    `left_out` [tokens, rows], [1, rows] or [rows]; None leaves nothing out.
    """
    u.mul_(coefficients)
    return u if left_out is None else u.masked_fill_(left_out, 0)


def zeros_of(coefficients: Tensor) -> Tensor | None:
    """What `weigh_` is to leave out so that a coefficient of zero means that, or None if there is no zero."""
    is_zero = coefficients == 0
    return is_zero if bool(is_zero.any()) else None


def expand_(y: Tensor, weighted: Tensor, expand_rows: Tensor) -> None:
    """y += w B, in place, for y [tokens, d_out], w [tokens, rows], B [rows, d_out]."""
    y.addmm_(weighted, expand_rows)


def reference_delta(
    x: Tensor, shrink_rows: Tensor, shrink_bias: Tensor, expand_rows: Tensor, coefficients: Tensor
) -> Tensor:
    """The definition, token by token and rank row by rank row; the oracle of the functions above."""
    delta = x.new_zeros(x.shape[0], expand_rows.shape[1])
    for token in range(x.shape[0]):
        for row in range(shrink_rows.shape[0]):
            u = torch.dot(shrink_rows[row], x[token]) + shrink_bias[row]
            if coefficients[token, row] != 0:
                delta[token] += coefficients[token, row] * u * expand_rows[row]
    return delta
