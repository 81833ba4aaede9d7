"""Decoder layers in few, large steps: same weights, same result, a fifth of the operations or less.

Where native kernels do all of it, all layers are one call (`layer_stack.py`). Else queries, keys and values are one
product, gate and up another, and a residual is added by the product before it. That is also how adapters are served
that say more than rank rows in segments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionserve.adapters.adapted_linear import Projections
from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.layer_form import GatedMLP, LayerForm
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_layer import NativeLayer
from fusionserve.kernels.pointwise import Angles, RMSNorm, gated_product, rms_norm


class DecoderLayer:
    """Computes what the layer of transformers computes whose form it has, with that layer's modules.

    `angles` says which of the model's it turns queries and keys by.
    """

    def __init__(self, form: LayerForm, angles: int) -> None:
        self._attention, self._settings, self._angles = form.attention, form.settings, angles
        self._heads, self._output = Projections(form.heads), Projections([form.output])
        self._mlp = _GatedProducts(form.mlp) if isinstance(form.mlp, GatedMLP) else form.mlp
        own = self._mlp.groups if isinstance(self._mlp, _GatedProducts) else ()
        self.groups: tuple[Projections, ...] = (self._heads, self._output, *own)
        self.cell = form.output.cell

    def compute(self, x: Tensor, angles: Sequence[Angles], batch: AttentionBatch) -> Tensor:
        """x [num_tokens, hidden] -> that shape, maybe that memory."""
        norms = self._settings.norms
        attended = self._attend(_normalized(norms.before_attention, x), angles[self._angles], batch)
        x = self._add_product(self._output, attended, x, norms.after_attention)
        inner = _normalized(norms.before_mlp, x)
        if isinstance(self._mlp, _GatedProducts):
            return self._add_product(self._mlp.down, self._mlp.gated(inner), x, norms.after_mlp)
        return self._add(self._mlp(inner[None])[0], x, norms.after_mlp)

    def cache_in(self, batch: AttentionBatch) -> LayerCache:
        """The layer's keys and values."""
        return batch.cache_of(self._attention)

    def native_layer(self, cache: LayerCache) -> NativeLayer | None:
        """The layer over a cache in one kernel, or None where there is none for all of it."""
        if not isinstance(self._mlp, _GatedProducts):
            return None
        heads, output, gate_and_up, down = (group.product for group in self.groups)
        if heads is None or output is None or gate_and_up is None or down is None:
            return None
        products, settings = (heads, output, gate_and_up, down), self._settings
        if not NativeLayer.can_compute(products, settings, cache.keys):
            return None
        return NativeLayer(products, settings, self._mlp.activation, self._angles, cache)

    def _attend(self, x: Tensor, angles: Angles, batch: AttentionBatch) -> Tensor:
        settings, outputs = self._settings, self._heads(x)
        if len(outputs) == 1:
            parts = torch.split(outputs[0], list(settings.head_widths), dim=-1)
            outputs = [part.contiguous() for part in parts]
        query, key, value = outputs
        query, key = _normalized(settings.norms.query, query), _normalized(settings.norms.key, key)
        query, key, value = (y.view(len(x), -1, settings.head_dim) for y in (query, key, value))
        heads = query, key, value
        attended = batch.rotate_and_attend(self._attention, heads, angles, settings.options)
        return attended.view(len(x), -1)

    def _add_product(self, module: Projections, y: Tensor, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """x + what the module makes of y, normalized or scaled before if the layer says so."""
        if norm is None and self._settings.residual_scale == 1:
            return module.add_(y, x)
        return self._add(module(y)[0], x, norm)

    def _add(self, y: Tensor, x: Tensor, norm: RMSNorm | None) -> Tensor:
        scale = self._settings.residual_scale
        if norm is not None:
            return x + rms_norm(y, norm)
        return x + (y if scale == 1 else y * scale)


class _GatedProducts:
    def __init__(self, form: GatedMLP) -> None:
        self._gate_and_up, self.down = Projections(form.gate_and_up), Projections([form.down])
        self.groups = (self._gate_and_up, self.down)
        self.activation = form.activation

    def gated(self, x: Tensor) -> Tensor:
        """What `down` takes."""
        outputs: Sequence[Tensor] = self._gate_and_up(x)
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return gated_product(self.activation, gate, up)


def _normalized(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """x [num_tokens, width], normalized in rows as wide as the norm, which may be those of heads."""
    return x if norm is None else rms_norm(x.view(-1, len(norm.weight)), norm).view(x.shape)
