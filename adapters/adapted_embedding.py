"""The input embedding that stands in for the base's: it runs the base module and adds what the batch's rows say."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fusionserve.adapters.pool import ModuleRows
from fusionserve.adapters.row_plan import PlanCell, RowPlan
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.linear_product import PanelEmbedding
from fusionserve.kernels.low_rank import shrink_embedding, weigh_, zeros_of


class AdaptedEmbedding(nn.Module):
    """The base's input embedding with the pool's rows beside it: a one-hot input of the same equation."""

    def __init__(
        self, base: nn.Embedding | PanelEmbedding, path: str, rows: ModuleRows, cell: PlanCell
    ) -> None:
        super().__init__()
        self.base = base
        self._path = path
        self._rows = rows
        self._cell = cell
        self._parts: GroupParts | None = None
        self._scale = embedding_scale(base)

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
                y[here] = functional.embedding(token_ids[here], saved.to(y.device)) * self._scale
        if self._rows.is_empty:
            return
        if plan.items is not None:
            part = self._rows.part
            if self._parts is None or not self._parts.are_of([part]):
                self._parts = GroupParts([part], [plan.items.module_ids[self._path]])
            plan.items.add_embedded_(token_ids, self._parts, y, self._scale)
        for span in plan.spans:
            tokens_here = slice(span.token_start, span.token_end)
            rows_here = slice(span.row_start, span.row_end)
            self._add_(token_ids[tokens_here], y[tokens_here], rows_here, span.coefficients, span.left_out)
        for segment in plan.segments.adapted if plan.segments else ():
            tokens_here = slice(segment.token_start, segment.token_end)
            rows_here = slice(segment.row_start, segment.row_end)
            coefficients = segment.coefficients.to(y.dtype)
            left_out = zeros_of(coefficients)
            self._add_(token_ids[tokens_here], y[tokens_here], rows_here, coefficients, left_out)

    def _add_(
        self, token_ids: Tensor, y: Tensor, rows: slice, coefficients: Tensor, left_out: Tensor | None
    ) -> None:
        u = shrink_embedding(token_ids, self._rows.shrink_rows[rows], self._rows.shrink_bias[rows])
        self._rows.expand_(y, weigh_(u, coefficients, left_out) * self._scale, rows)


def embedding_scale(base: nn.Embedding | PanelEmbedding) -> float:
    """What the module multiplies its rows by, rounded as it does; Gemma's holds it in a tensor of another type."""
    scale: Tensor | float = getattr(base, "embed_scale", 1.0)
    return float(scale.to(base.weight.dtype)) if isinstance(scale, Tensor) else float(scale)
