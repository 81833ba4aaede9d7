"""The tokens of a batch that one fusion adapts, and their fusion weights as the forward pass finds them."""

from __future__ import annotations

from torch import Tensor

from fusionserve.adapters.fusion_rows import FusionRows
from fusionserve.kernels.low_rank import expand_, shrink, weigh


class FusedTokens:
    """Tokens [start, end) of the batch, adapted by the fusion whose rows begin at `row_start` in the pool.

    `allowed` [members] or [tokens, members] is False for members that a request excludes. An attention sets the
    coefficients; modules without one use those of the attention before them in their layer.
    """

    def __init__(self, start: int, end: int, row_start: int, rows: FusionRows, allowed: Tensor) -> None:
        self.start = start
        self.end = end
        self.weights: dict[str, Tensor] = {}  # by path of the attention, [tokens, members (+ 1)]
        self._row_start = row_start
        self._rows = rows
        self._allowed = allowed
        self._coefficients: Tensor | None = None  # [tokens, member rows]

    def add_(
        self, path: str, x: Tensor, y: Tensor, shrink_rows: Tensor, shrink_bias: Tensor, expand_rows: Tensor
    ) -> None:
        """y += sum_i a_i C_i A_i x on these tokens of x [num_tokens, d_in], y [num_tokens, d_out], in place."""
        module = self._rows.modules.get(path)
        if module is None:
            return
        num_rows = self._rows.num_member_rows
        num_shrunk = self._rows.num_rows if module.has_attention else num_rows
        here = slice(self._row_start, self._row_start + num_shrunk)
        u = shrink(x[self.start : self.end], shrink_rows[here], shrink_bias[here])
        if module.has_attention:
            self._attend(path, u[:, :num_rows], u[:, num_rows:], self._allowed & module.present)
        assert self._coefficients is not None, f"{path} is computed before the attention of its layer"
        weighted = weigh(u[:, :num_rows], self._coefficients).to(y.dtype)
        expand_(y[self.start : self.end], weighted, expand_rows[self._row_start : self._row_start + num_rows])

    def _attend(self, path: str, u: Tensor, scores: Tensor, allowed: Tensor) -> None:
        self.weights[path] = self._rows.weights(u, scores, allowed)
        self._coefficients = self.weights[path].index_select(1, self._rows.member_of_row)
