"""The linear layers that stand in for the base's, and groups of them that share an input and are computed together.

    y = W0 x + b0 + sum_i c_i s_i B_i A_i x      c_i given by the request, or by a fusion's attention

Queries, keys and values are such a group, and gate and up; every other module is a group of one. The row plan is read
from a cell, because a transformers module can only be handed its input. A base-only batch costs one attribute look-up
and one comparison per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.fused_tokens import FusedSegment
from fusionserve.adapters.pool import ModuleRows
from fusionserve.adapters.row_plan import PlanCell, RowPlan, SegmentPlan
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.linear_product import LinearProduct
from fusionserve.kernels.low_rank import weigh_
from fusionserve.kernels.projections import project
from fusionserve.kernels.segments import Addition, Additions

if TYPE_CHECKING:
    from fusionserve.kernels.device.rank_items import RankItems


class AdaptedLinear(nn.Module):
    """A linear module (nn.Linear, or GPT-2's Conv1D) of the base with the pool's rows beside it."""

    def __init__(self, base: nn.Module, path: str, rows: ModuleRows, cell: PlanCell) -> None:
        super().__init__()
        self.base = base
        self.path = path
        self.rows = rows
        self.cell = cell
        self._alone = Projections([self])

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
        return self._alone(x)[0]


class Projections:
    """The modules of one group, which read one plan."""

    def __init__(self, modules: Sequence[AdaptedLinear]) -> None:
        self.modules = tuple(modules)
        self.cell = modules[0].cell
        self._additions = Additions([])  # without attentions
        self._layout = 0  # the pool's, which they are for
        self._parts: GroupParts | None = None
        self.product = LinearProduct.of([module.base for module in modules])

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., num_tokens, d_in] -> [..., num_tokens, d_out] of each module."""
        plan = self.cell.plan
        if self.product is None:
            outputs = [module.base(x) for module in self.modules]
        else:
            outputs = self.product.new_outputs(x)
            self._multiply(self.product, x, outputs, plan, add=False)
        if not plan.is_empty:
            flat = [output.view(-1, output.shape[-1]) for output in outputs]
            self._adapt_(x.reshape(-1, x.shape[-1]), flat, plan)
        return outputs

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + y for a group of one, x [num_tokens, d_in]; residual [num_tokens, d_out] may be written to."""
        plan = self.cell.plan
        if self.product is None and not self._is_plain_on_device(x):
            return residual + self(x)[0]
        # What scales or replaces an output must have it apart, rounded; other tokens' bits do not depend on them.
        whole = [tokens for tokens in plan.whole_modules if tokens.changes(self.modules[0].path)]
        apart = residual + self(x)[0] if whole else residual
        if self.product is None:
            residual.addmm_(x, self.modules[0].weight.t())
        else:
            self._multiply(self.product, x, [residual], plan, add=True)
        if not plan.is_empty:
            self._adapt_(x, [residual], plan)
        for tokens in whole:
            residual[tokens.start : tokens.end] = apart[tokens.start : tokens.end]
        return residual

    def _is_plain_on_device(self, x: Tensor) -> bool:
        """True if a GPU's library adds the product to a residual in one launch, rounding once for twice."""
        base = self.modules[0].base
        return type(base) is nn.Linear and base.bias is None and uses_triton(x.device)

    def _multiply(
        self, product: LinearProduct, x: Tensor, outputs: Sequence[Tensor], plan: RowPlan, *, add: bool
    ) -> None:
        """The base's product, natively with what segments add to it."""
        if plan.segments is None or product.native(x) is None or all(m.rows.is_empty for m in self.modules):
            product.compute(x, outputs, add=add)
        else:
            additions = self.additions(plan.segments)
            project(product, x, outputs, additions, plan.segments.together, add=add)

    def _adapt_(self, x: Tensor, outputs: Sequence[Tensor], plan: RowPlan) -> None:
        """What the product leaves to do, in place; x [num_tokens, d_in], outputs [num_tokens, d_out]."""
        assert x.shape[0] == plan.num_tokens, (
            f"{self.modules[0].path} sees {x.shape[0]} of {plan.num_tokens} tokens"
        )
        if plan.whole_modules:
            for module, y in zip(self.modules, outputs, strict=True):
                _replace_(module, x, y, plan)
        if plan.spans or plan.fused:
            for module, y in zip(self.modules, outputs, strict=True):
                if not module.rows.is_empty:
                    _add_spans_(module, x, y, plan)
        if plan.items is not None:
            self._add_items_(x, outputs, plan.items)
        if plan.segments is not None and (self.product is None or self.product.native(x) is None):
            plan.segments.together.add_(x, self.additions(plan.segments), outputs)
        if plan.whole_modules:
            for module, y in zip(self.modules, outputs, strict=True):
                _scale_columns_(module, y, plan)

    def _add_items_(self, x: Tensor, outputs: Sequence[Tensor], items: RankItems) -> None:
        """Of all modules that have rank rows, at once."""
        adapted = [(m, y) for m, y in zip(self.modules, outputs, strict=True) if not m.rows.is_empty]
        if not adapted:
            return
        parts = [module.rows.part for module, _ in adapted]
        if self._parts is None or not self._parts.are_of(parts):
            self._parts = GroupParts(parts, [items.module_ids[module.path] for module, _ in adapted])
        items.add_(x, self._parts, [y for _, y in adapted])

    def additions(self, segments: SegmentPlan) -> Additions:
        """What the segments add to the group; an attention comes before its module and those up to the next one's."""
        fused = [[f for f in segments.fused if f.attends_at(module.path)] for module in self.modules]
        return self._with_attentions(fused) if any(fused) else self._without_attentions()

    def _with_attentions(self, fused: Sequence[Sequence[FusedSegment]]) -> Additions:
        """Those of `fused`, some for each module."""
        additions: list[Addition] = []
        for place, (module, segments) in enumerate(zip(self.modules, fused, strict=True)):
            if module.rows.is_empty:
                continue
            if segments or not additions:
                attentions = [segment.attention(module.path, module.rows) for segment in segments]
                additions.append(Addition({}, attentions))
            additions[-1].rows[place] = module.rows.part
        return Additions(additions)

    def _without_attentions(self) -> Additions:
        """Made anew only when the pool has other tensors."""
        layout = sum(module.rows.layout for module in self.modules)
        if layout != self._layout:
            self._layout, self._additions = layout, self._with_attentions([()] * len(self.modules))
        return self._additions


def _add_spans_(module: AdaptedLinear, x: Tensor, y: Tensor, plan: RowPlan) -> None:
    """y += the low-rank part of every span and of the fused tokens; x [num_tokens, d_in], y [num_tokens, d_out]."""
    rows = module.rows
    for span in plan.spans:
        tokens_here, rows_here = slice(span.token_start, span.token_end), slice(span.row_start, span.row_end)
        u = rows.shrink(x[tokens_here], rows_here)
        rows.expand_(y[tokens_here], weigh_(u, span.coefficients, span.left_out), rows_here)
    for fused in plan.fused:
        fused.add_(module.path, x, y, rows)


def _replace_(module: AdaptedLinear, x: Tensor, y: Tensor, plan: RowPlan) -> None:
    """The tokens of adapters that saved the whole module, which to a GPU is copied in every step."""
    for tokens in plan.whole_modules:
        weights = tokens.whole_module.weights
        saved, bias = weights.replacements.get(module.path), weights.replaced_biases.get(module.path)
        if saved is not None:
            here = slice(tokens.start, tokens.end)
            bias = module.bias if bias is None else bias.to(x.device)
            y[here] = functional.linear(x[here], saved.to(x.device), bias)


def _scale_columns_(module: AdaptedLinear, y: Tensor, plan: RowPlan) -> None:
    """DoRA's y = c * (W0 x + s B A x) + b0, on the tokens of its adapters."""
    for tokens in plan.whole_modules:
        _scale_tokens_(module, y[tokens.start : tokens.end], tokens.whole_module)


def _scale_tokens_(module: AdaptedLinear, y: Tensor, adapter: Adapter) -> None:
    scale = adapter.content.column_scales.get(module.path)
    if scale is not None:
        bias = 0 if module.bias is None else module.bias
        y.copy_((y - bias) * scale.to(y.device) + bias)
