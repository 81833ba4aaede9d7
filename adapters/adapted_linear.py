"""The linear layers that stand in for the base's, and groups of them that share an input and are computed together.

    y = W0 x + b0 + sum_i c_i s_i B_i A_i x      c_i given by the request, or by a fusion's attention

Queries, keys and values are such a group, and gate and up; every other module is a group of one. The row plan is read
from a cell, because a transformers module can only be handed its input. A base-only batch costs one attribute look-up
and one comparison per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from torch import Tensor, nn
from torch.nn import functional

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.pool import ModuleRows
from fusionserve.adapters.row_plan import PlanCell, RowPlan, SegmentPlan
from fusionserve.kernels.linear_product import LinearProduct
from fusionserve.kernels.low_rank import weigh_
from fusionserve.kernels.segments import Parts


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
        self._modules = tuple(modules)
        self._cell = modules[0].cell
        self._parts: dict[int, Parts] = {}  # by the first of the modules
        self._product = LinearProduct.of([module.base for module in modules])

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [..., num_tokens, d_in] -> [..., num_tokens, d_out] of each module."""
        outputs = [module.base(x) for module in self._modules] if self._product is None else self._product(x)
        plan = self._cell.plan
        if not plan.is_empty:
            flat = [output.view(-1, output.shape[-1]) for output in outputs]
            self._adapt_(x.reshape(-1, x.shape[-1]), flat, plan)
        return outputs

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + y for a group of one, x [num_tokens, d_in]; residual [num_tokens, d_out] may be written to."""
        plan = self._cell.plan
        if self._product is None or plan.whole_modules:
            return residual + self(x)[0]
        self._product.add_(x, residual)
        if not plan.is_empty:
            self._adapt_(x, [residual], plan)
        return residual

    def _adapt_(self, x: Tensor, outputs: Sequence[Tensor], plan: RowPlan) -> None:
        """x [num_tokens, d_in], outputs [num_tokens, d_out]; in place."""
        assert x.shape[0] == plan.num_tokens, (
            f"{self._modules[0].path} sees {x.shape[0]} of {plan.num_tokens} tokens"
        )
        if plan.whole_modules:
            for module, y in zip(self._modules, outputs, strict=True):
                _replace_(module, x, y, plan)
        if plan.spans or plan.fused:
            for module, y in zip(self._modules, outputs, strict=True):
                if not module.rows.is_empty:
                    _add_spans_(module, x, y, plan)
        if plan.segments is not None:
            self._add_segments_(x, outputs, plan.segments)
        if plan.whole_modules:
            for module, y in zip(self._modules, outputs, strict=True):
                _scale_columns_(module, y, plan)

    def _add_segments_(self, x: Tensor, outputs: Sequence[Tensor], segments: SegmentPlan) -> None:
        """The native part. An attention sets the coefficients of its module and of those up to the next attention."""
        touched = [index for index, module in enumerate(self._modules) if not module.rows.is_empty]
        while touched:
            first = self._modules[touched[0]]
            for fused in segments.fused:
                if fused.attends_at(first.path):
                    fused.attend(first.path, x, first.rows)
            here = _until_next_attention(touched, self._modules, segments)
            segments.together.add_(x, self._parts_of(here), [outputs[index] for index in here])
            touched = touched[len(here) :]

    def _parts_of(self, indices: Sequence[int]) -> Parts:
        """The modules' rank rows, made anew only when the pool has other tensors for them."""
        rows = [self._modules[index].rows.part for index in indices]
        parts = self._parts.get(indices[0])
        if parts is None or any(old is not new for old, new in zip_longest(parts.rows, rows)):
            parts = self._parts[indices[0]] = Parts(rows)
        return parts


def _until_next_attention(
    indices: Sequence[int], modules: Sequence[AdaptedLinear], segments: SegmentPlan
) -> Sequence[int]:
    """The first of these modules and those behind it that have no attention of their own."""
    if segments.fused:
        for count, index in enumerate(indices[1:], 1):
            if any(fused.attends_at(modules[index].path) for fused in segments.fused):
                return indices[:count]
    return indices


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
    """The tokens of adapters that saved the whole module."""
    for tokens in plan.whole_modules:
        saved = tokens.whole_module.weights.replacements.get(module.path)
        if saved is not None:
            here = slice(tokens.start, tokens.end)
            y[here] = functional.linear(x[here], saved, module.bias)


def _scale_columns_(module: AdaptedLinear, y: Tensor, plan: RowPlan) -> None:
    """DoRA's y = c * (W0 x + s B A x) + b0, on the tokens of its adapters."""
    for tokens in plan.whole_modules:
        _scale_tokens_(module, y[tokens.start : tokens.end], tokens.whole_module)


def _scale_tokens_(module: AdaptedLinear, y: Tensor, adapter: Adapter) -> None:
    scale = adapter.content.column_scales.get(module.path)
    if scale is not None:
        bias = 0 if module.bias is None else module.bias
        y.copy_((y - bias) * scale + bias)
