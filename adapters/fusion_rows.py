"""How a fusion's rank rows become coefficients: the part of the equation that depends on the token.

    u = A x + a0     g = M x + m     score_i = sum_j u_j g_j + n_i x     a = softmax_i(score)     c_j = a_(member of j)

A fusion's range in the pool holds its members' rows first and the rows of the scores behind them, so a module with an
attention is served by one shrink over both, and every other module by the members' rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.adapters.resident import even
from fusionserve.kernels.fusion_weights import masked_softmax, member_scores, with_base_member


@dataclass(frozen=True, eq=False)  # no slots: the cached property needs a place
class FusionModule:
    """Whether a module has an attention, and which members adapt it: a bool [members]."""

    has_attention: bool
    present: Tensor

    @cached_property
    def is_complete(self) -> bool:
        """True if every member adapts it."""
        return bool(self.present.all())


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: the cached properties need a place
class FusionRows:
    """The layout of a fusion's rank rows, the same in every module: those of each member, then those of the scores."""

    row_counts: tuple[int, ...]
    has_member_keys: bool
    has_base_member: bool
    modules: Mapping[str, FusionModule]  # by path; elsewhere the fusion does nothing

    @cached_property
    def num_member_rows(self) -> int:
        """Rows of all members together."""
        return sum(self.row_counts)

    @property
    def num_members(self) -> int:
        """Members, the base member not counted."""
        return len(self.row_counts)

    @cached_property
    def num_used_rows(self) -> int:
        """All rows that say something: the members', as many for the scores, and one per member for its key."""
        return 2 * self.num_member_rows + (self.num_members if self.has_member_keys else 0)

    @property
    def num_rows(self) -> int:
        """Those it takes in the pool."""
        return even(self.num_used_rows)

    @cached_property
    def member_of_row(self) -> Tensor:
        """The member that each of the members' rows belongs to, [rows]."""
        return torch.arange(self.num_members).repeat_interleave(torch.tensor(self.row_counts))

    def weights(self, u: Tensor, scores: Tensor, allowed: Tensor | None) -> Tensor:
        """Fusion weights [tokens, members (+ 1)], float32, of u [tokens, rows] and the output of the scores' rows.

        `allowed` [members] or [tokens, members]; None allows all.
        """
        num_rows = self.num_member_rows
        key_scores = scores[:, num_rows:] if self.has_member_keys else None
        totals = member_scores(u, scores[:, :num_rows], self.member_of_row, self.num_members, key_scores)
        if self.has_base_member:
            totals = with_base_member(totals)
            allowed = None if allowed is None else functional.pad(allowed, (0, 1), value=True)
        return masked_softmax(totals, None if allowed is None else allowed.expand_as(totals))

    def own_weights(self, weights: Tensor) -> Tensor:
        """[..., members (+ 1)] of weights that have room for more members before the base member's, or do not."""
        num_base = int(self.has_base_member)
        if weights.shape[-1] == self.num_members + num_base:
            return weights
        base = weights[..., weights.shape[-1] - num_base :]
        return torch.cat((weights[..., : self.num_members], base), dim=-1)
