"""The fold: K, Q and V never exist at run time. Exact in real arithmetic.

    M_i = s_i B_i^T K^T Q / T    [r_i, d_in]      m_i = s_i B_i^T K^T b_Q / T    [r_i]
    n_i = Q^T e_i / T            [d_in]           with the constant b_Q . e_i / T
    C_i = s_i V B_i              [d_out, r_i]     without V the member's own s_i B_i

    score_i = u_i . (M_i x + m_i) + n_i . x + const        y = W0 x + sum_i a_i C_i u_i

M_i and C_i depend on member i alone, so masking a member is leaving its rows out. A bias of B is the member's last rank
row, with u = 1, and folds like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.adapters.lora_weights import ModuleLoRA
from fusionserve.fusion.attention import FusionAttention, FusionValue


@dataclass(frozen=True, slots=True, eq=False)
class ScoreRows:
    """The rows that give the scores of one attention: M of every member, then n of every member if there are keys."""

    shrink: Tensor  # [rows (+ members), d_in]
    shrink_bias: Tensor  # [rows (+ members)]


@torch.no_grad()
def fold_attention(
    attention: FusionAttention,
    members: Sequence[ModuleLoRA | None],
    row_counts: Sequence[int],
    temperature: float,
    dtype: torch.dtype,
) -> ScoreRows:
    """Folds one attention; member i takes `row_counts[i]` rows, zeros where its rank here is smaller or it is None.

    Computed in float32, or float64 if the attention is; returned in `dtype`.
    """
    query, key = attention.query.weight / temperature, attention.key.weight
    num_keys = 0 if attention.member_keys is None else len(members)
    num_rows = sum(row_counts)
    shrink = torch.zeros(num_rows + num_keys, query.shape[1], dtype=dtype)
    bias = torch.zeros(num_rows + num_keys, dtype=dtype)
    query_bias = attention.query.bias / temperature
    start = 0
    for member, count in zip(members, row_counts, strict=True):
        if member is not None:
            keys = member.expand.to(key.dtype) @ key.T  # [rank, d_key]
            shrink[start : start + member.rank] = keys @ query
            bias[start : start + member.rank] = keys @ query_bias
        start += count
    if attention.member_keys is not None:
        shrink[num_rows:] = attention.member_keys @ query
        bias[num_rows:] = attention.member_keys @ query_bias
    return ScoreRows(shrink, bias)


@torch.no_grad()
def fold_value(value: FusionValue, member: ModuleLoRA, dtype: torch.dtype) -> Tensor:
    """C_i^T as rows [rank, d_out]: V applied to every expand row of the member."""
    wide = torch.promote_types(member.expand.dtype, torch.float32)
    wide = torch.promote_types(wide, next(value.parameters()).dtype)
    folded: Tensor = value(member.expand.to(wide))
    return folded.to(dtype)
