"""The layers that stand in for the base's: they run the base module and add what the batch's rows say.

    y = W0 x + b0 + sum_i c_i s_i B_i A_i x      c_i given by the request, or by a fusion's attention

A row plan is read from a cell, because a transformers module can only be handed its input. A base-only batch costs one
attribute look-up and one comparison per module.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.pool import ModuleRows
from fusionserve.adapters.row_plan import PlanCell, RowPlan
from fusionserve.kernels.low_rank import shrink_embedding, weigh_


class AdaptedLinear(nn.Module):
    """A linear module (nn.Linear, or GPT-2's Conv1D) of the base with the pool's rows beside it."""

    def __init__(self, base: nn.Module, path: str, rows: ModuleRows, cell: PlanCell) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._rows = rows
        self._cell = cell

    @property
    def weight(self) -> Tensor:
        """The base module's own weight; some models look at it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base module's own bias."""
        bias = self.base.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """x [..., num_tokens, d_in] -> [..., num_tokens, d_out]."""
        output: Tensor = self.base(x)
        plan = self._cell.plan
        if not plan.is_empty:
            self._adapt_(x.reshape(-1, x.shape[-1]), output.view(-1, output.shape[-1]), plan)
        return output

    def _adapt_(self, x: Tensor, y: Tensor, plan: RowPlan) -> None:
        assert x.shape[0] == plan.num_tokens, f"{self._path} sees {x.shape[0]} of {plan.num_tokens} tokens"
        for tokens in plan.whole_modules:
            saved = tokens.whole_module.weights.replacements.get(self._path)
            if saved is not None:
                y[tokens.start : tokens.end] = functional.linear(
                    x[tokens.start : tokens.end], saved, self.bias
                )
        if not self._rows.is_empty:
            _add_low_rank_(self._rows, x, y, plan)
            for fused in plan.fused:
                fused.add_(self._path, x, y, self._rows)
        for tokens in plan.whole_modules:
            self._scale_columns_(y[tokens.start : tokens.end], tokens.whole_module)

    def _scale_columns_(self, y: Tensor, adapter: Adapter) -> None:
        """DoRA's y = c * (W0 x + s B A x) + b0, in place, on the tokens of one adapter."""
        scale = adapter.content.column_scales.get(self._path)
        if scale is not None:
            bias = 0 if self.bias is None else self.bias
            y.copy_((y - bias) * scale + bias)


class AdaptedEmbedding(nn.Module):
    """The base's input embedding with the pool's rows beside it: a one-hot input of the same equation."""

    def __init__(self, base: nn.Embedding, path: str, rows: ModuleRows, cell: PlanCell) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._rows = rows
        self._cell = cell
        self._scale = getattr(base, "embed_scale", 1.0)  # Gemma 3 multiplies inside the module

    @property
    def weight(self) -> Tensor:
        """The base embedding's own weight."""
        return self.base.weight

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [..., num_tokens] -> [..., num_tokens, hidden]."""
        output: Tensor = self.base(token_ids)
        plan = self._cell.plan
        if not plan.is_empty:
            self._adapt_(token_ids.reshape(-1), output.view(-1, output.shape[-1]), plan)
        return output

    def _adapt_(self, token_ids: Tensor, y: Tensor, plan: RowPlan) -> None:
        for tokens in plan.whole_modules:
            saved = tokens.whole_module.weights.replacements.get(self._path)
            if saved is not None:
                here = slice(tokens.start, tokens.end)
                y[here] = functional.embedding(token_ids[here], saved) * self._scale
        if self._rows.is_empty:
            return
        for span in plan.spans:
            tokens_here, rows_here = (
                slice(span.token_start, span.token_end),
                slice(span.row_start, span.row_end),
            )
            u = shrink_embedding(
                token_ids[tokens_here], self._rows.shrink_rows[rows_here], self._rows.shrink_bias[rows_here]
            )
            weighted = weigh_(u, span.coefficients, span.left_out) * self._scale
            self._rows.expand_(y[tokens_here], weighted, rows_here)


def _add_low_rank_(rows: ModuleRows, x: Tensor, y: Tensor, plan: RowPlan) -> None:
    """y += the low-rank part of every span; x [num_tokens, d_in], y [num_tokens, d_out]."""
    for span in plan.spans:
        tokens_here, rows_here = slice(span.token_start, span.token_end), slice(span.row_start, span.row_end)
        u = rows.shrink(x[tokens_here], rows_here)
        rows.expand_(y[tokens_here], weigh_(u, span.coefficients, span.left_out), rows_here)
