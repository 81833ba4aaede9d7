"""The attention of AdapterFusion (arXiv 2005.00247) over LoRA outputs, unfolded: the definition, and what trains.

    up_i    = s_i B_i A_i x (+ s_i b_i)
    score_i = (Q x + b_Q) . (K up_i + e_i) / T      plain dot product, no 1/sqrt(d)
    a       = softmax_i(score)                      over the members present; a base member has score 0
    y       = W0 x + sum_i a_i V up_i

A key bias would add the same number to every score and is left out; the learned vector e_i per member does not cancel.
`fold.py` turns this into rank rows for serving.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionserve.fusion.config import FusionConfig, ValueKind
from fusionserve.kernels.fusion_weights import masked_softmax, member_scores, with_base_member

_INIT_STD = 0.02


class FusionAttention(nn.Module):
    """Scores and weights at one attention: `query`, `key` and maybe `member_keys` train, all else is given."""

    def __init__(self, config: FusionConfig, d_in: int, d_out: int) -> None:
        super().__init__()
        self.query = nn.Linear(d_in, config.d_key)
        self.key = nn.Linear(d_out, config.d_key, bias=False)
        self.member_keys = (
            nn.Parameter(torch.randn(len(config.members), config.d_key) * _INIT_STD)
            if config.member_keys
            else None
        )
        self._num_members = len(config.members)
        self._temperature = config.temperature
        self._has_base_member = config.base_member
        for weight in (self.query.weight, self.key.weight):
            nn.init.normal_(weight, std=_INIT_STD)
        nn.init.zeros_(self.query.bias)

    def scores(self, x: Tensor, ups: Tensor) -> Tensor:
        """The definition: x [tokens, d_in], ups [tokens, members, d_out] -> [tokens, members]."""
        keys = self.key(ups)
        if self.member_keys is not None:
            keys = keys + self.member_keys
        scores: Tensor = torch.einsum("td,tmd->tm", self.query(x), keys) / self._temperature
        return scores

    def row_scores(self, x: Tensor, u: Tensor, expand: Tensor, member_of_row: Tensor) -> Tensor:
        """The same scores from u [tokens, rows] and expand [rows, d_out], without the members' outputs.

        K up_i = sum_j u_ij (K expand_ij): K meets every row once instead of every token and member.
        """
        query = self.query(x) / self._temperature
        g = query @ self.key(expand).T  # [tokens, rows]
        key_scores = None if self.member_keys is None else query @ self.member_keys.T
        return member_scores(u, g, member_of_row, self._num_members, key_scores)

    def forward(
        self,
        x: Tensor,
        u: Tensor,
        expand: Tensor,
        member_of_row: Tensor,
        allowed: Tensor,
        dropout: float = 0.0,
    ) -> Tensor:
        """Fusion weights [tokens, members (+ 1 for the base member)]; `allowed` [members] or [tokens, members].

        `dropout` zeroes raw scores, as in the paper's code.
        """
        scores = self.row_scores(x, u, expand, member_of_row)
        scores = functional.dropout(scores, dropout, self.training)
        if self._has_base_member:
            scores, allowed = with_base_member(scores), functional.pad(allowed, (0, 1), value=True)
        return masked_softmax(scores, allowed.expand_as(scores))


class FusionValue(nn.Module):
    """V of one module, the identity at first: a diagonal, or I + U D of low rank."""

    def __init__(self, config: FusionConfig, d_out: int) -> None:
        super().__init__()
        assert config.value is not ValueKind.NONE, "without V there is nothing to train"
        if config.value is ValueKind.DIAGONAL:
            self.weight = nn.Parameter(torch.ones(d_out))
            return
        self.down = nn.Linear(d_out, config.value_rank, bias=False)
        self.up = nn.Linear(config.value_rank, d_out, bias=False)
        nn.init.normal_(self.down.weight, std=_INIT_STD)
        nn.init.zeros_(self.up.weight)

    def forward(self, ups: Tensor) -> Tensor:
        """V up for ups [..., d_out]."""
        if hasattr(self, "weight"):
            return ups * self.weight
        update: Tensor = self.up(self.down(ups))
        return ups + update

    def distance_from_identity(self) -> Tensor:
        """|V - I|^2 (Frobenius), the regulariser's term."""
        if hasattr(self, "weight"):
            return (self.weight - 1).square().sum()
        # |U D|^2 = trace((U^T U)(D D^T)), without the d_out x d_out product
        up, down = self.up.weight, self.down.weight
        return ((up.T @ up) * (down @ down.T)).sum()
