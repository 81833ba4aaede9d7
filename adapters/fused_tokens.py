"""The tokens of a batch that one fusion adapts, and their fusion weights as the forward pass finds them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.adapters.fusion_rows import FusionModule, FusionRows
from fusionserve.adapters.pool import ModuleRows
from fusionserve.kernels.low_rank import weigh_
from fusionserve.kernels.segments import FusionAttention, MemberAttention, Segment


class FusedTokens:
    """Tokens [start, end) of the batch, adapted by the fusion whose rows begin at `row_start` in the pool.

    `allowed` [members] or [tokens, members] is False for members that a request excludes. An attention sets the
    coefficients; modules without one use those of the attention before them in their layer.
    """

    def __init__(self, start: int, end: int, row_start: int, rows: FusionRows, allowed: Tensor) -> None:
        self.start = start
        self.end = end
        self.weights: dict[str, Tensor] = {}  # by path of the attention, [tokens, members (+ 1)]
        self._rows = rows
        self._num_member_rows = rows.num_member_rows
        self._tokens_here = slice(start, end)
        self._member_rows_here = slice(row_start, row_start + rows.num_member_rows)
        self._all_rows_here = slice(row_start, row_start + rows.num_used_rows)
        self._allowed = None if bool(allowed.all()) else allowed
        self._coefficients: Tensor | None = None  # [tokens, member rows]
        # [member rows] or [tokens, member rows], of members without a say
        self._left_out: Tensor | None = None

    def add_(self, path: str, x: Tensor, y: Tensor, rows: ModuleRows) -> None:
        """y += sum_i a_i C_i A_i x on these tokens of x [num_tokens, d_in], y [num_tokens, d_out], in place."""
        module = self._rows.modules.get(path)
        if module is None:
            return
        if module.has_attention:
            u = rows.shrink(x[self._tokens_here], self._all_rows_here)
            u, scores = u[:, : self._num_member_rows], u[:, self._num_member_rows :]
            self._attend(path, module, u, scores)
        else:
            u = rows.shrink(x[self._tokens_here], self._member_rows_here)
        assert self._coefficients is not None, f"{path} is computed before the attention of its layer"
        weighted = weigh_(u, self._coefficients, self._left_out)
        rows.expand_(y[self._tokens_here], weighted, self._member_rows_here)

    def _attend(self, path: str, module: FusionModule, u: Tensor, scores: Tensor) -> None:
        allowed = allowed_members(module, self._allowed)
        member_of_row = self._rows.member_of_row
        self.weights[path] = self._rows.weights(u, scores, allowed)
        self._coefficients = self.weights[path].index_select(1, member_of_row)
        self._left_out = None if allowed is None else ~allowed.index_select(-1, member_of_row)


@dataclass(slots=True, eq=False)
class FusedRange:
    """The same for the kernels of a GPU, where all fusions of a batch are in the same tables.

    `weights` [attentions, tokens, width + 1] are those at `attentions`, as the kernels leave them: for as many members
    as the widest fusion has, and the base member's last.
    """

    start: int
    end: int
    row_start: int
    rows: FusionRows
    allowed: Tensor
    attentions: tuple[str, ...] = ()
    weights: Tensor | None = None


class FusedSegment:
    """The same, computed natively: a segment whose coefficients an attention fills."""

    def __init__(self, start: int, end: int, row_start: int, rows: FusionRows, allowed: Tensor) -> None:
        self.start = start
        self.end = end
        self.weights: dict[str, Tensor] = {}  # by path of the attention, [tokens, members (+ 1)]
        self._rows = rows
        self._row_start = row_start
        self._allowed = None if bool(allowed.all()) else allowed.contiguous()
        self._coefficients = torch.zeros(end - start, rows.num_member_rows)
        end_row = row_start + rows.num_member_rows
        self.segment = Segment(start, end, row_start, end_row, rows.num_rows, self._coefficients)

    def begin_step(self) -> None:
        """Forgets the weights of the step before, which may be NaN: rows of zeros may meet them before an attention."""
        self._coefficients.zero_()

    def attends_at(self, path: str) -> bool:
        """True if this module's attention must run before its rows are added."""
        module = self._rows.modules.get(path)
        return module is not None and module.has_attention

    def attention(self, path: str, rows: ModuleRows) -> MemberAttention:
        """What sets the coefficients when it runs, for this module and those behind it without attention."""
        fusion = FusionAttention(
            token_start=self.start,
            token_end=self.end,
            row_start=self._row_start,
            extent=self._rows.num_rows,
            member_of_row=self._rows.member_of_row,
            num_members=self._rows.num_members,
            has_member_keys=self._rows.has_member_keys,
            has_base_member=self._rows.has_base_member,
            allowed=allowed_members(self._rows.modules[path], self._allowed),
        )
        attention = MemberAttention(rows.part, fusion, self._coefficients)
        self.weights[path] = attention.weights
        return attention


def allowed_members(module: FusionModule, allowed: Tensor | None) -> Tensor | None:
    """The members that may have a say in an attention: allowed by the requests, and adapting the module. None: all."""
    if module.is_complete:
        return allowed
    return module.present if allowed is None else allowed & module.present
