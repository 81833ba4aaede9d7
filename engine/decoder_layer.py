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
from fusionserve.engine.layer_form import LayerForm
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_layer import LayerSettings, NativeLayer
from fusionserve.kernels.pointwise import Angles, RMSNorm, gated_product, rms_norm


class DecoderLayer:
    """Computes what the layer of transformers computes whose form it has, with that layer's modules.

    `angles` says which of the model's it turns queries and keys by.
    """

    def __init__(self, form: LayerForm, angles: int) -> None:
        self._attention = form.attention
        self._heads, self._output = Projections(form.heads), Projections([form.output])
        self._gate_and_up, self._down = Projections(form.gate_and_up), Projections([form.down])
        self.groups = (self._heads, self._output, self._gate_and_up, self._down)
        self.cell = form.output.cell
        self._settings = LayerSettings(
            norms=form.norms,
            num_heads=form.num_heads,
            num_kv_heads=form.num_kv_heads,
            head_dim=form.head_dim,
            options=form.options,
            activation=form.activation,
            residual_scale=form.residual_scale,
            angles=angles,
        )

    def compute(self, x: Tensor, angles: Sequence[Angles], batch: AttentionBatch) -> Tensor:
        """x [num_tokens, hidden] -> that shape, maybe that memory."""
        norms = self._settings.norms
        attended = self._attend(_normalized(norms.before_attention, x), angles, batch)
        x = self._add(self._output, attended, x, norms.after_attention)
        gate, up = self._gate_and_up_of(_normalized(norms.before_mlp, x))
        return self._add(self._down, gated_product(self._settings.activation, gate, up), x, norms.after_mlp)

    def cache_in(self, batch: AttentionBatch) -> LayerCache:
        """The layer's keys and values."""
        return batch.cache_of(self._attention)

    def native_layer(self, cache: LayerCache) -> NativeLayer | None:
        """The layer over a cache in one kernel, or None where there is none for all of it."""
        heads, output, gate_and_up, down = (group.product for group in self.groups)
        if heads is None or output is None or gate_and_up is None or down is None:
            return None
        products = heads, output, gate_and_up, down
        can_compute = NativeLayer.can_compute(products, self._settings, cache.keys)
        return NativeLayer(products, self._settings, cache) if can_compute else None

    def _attend(self, x: Tensor, angles: Sequence[Angles], batch: AttentionBatch) -> Tensor:
        settings = self._settings
        outputs: Sequence[Tensor] = self._heads(x)
        if len(outputs) == 1:
            outputs = [
                part.contiguous() for part in torch.split(outputs[0], list(settings.head_widths), dim=-1)
            ]
        query, key, value = outputs
        query, key = _normalized(settings.norms.query, query), _normalized(settings.norms.key, key)
        query, key, value = (y.view(len(x), -1, settings.head_dim) for y in (query, key, value))
        own_angles = angles[settings.angles]
        attended = batch.rotate_and_attend(self._attention, (query, key, value), own_angles, settings.options)
        return attended.view(len(x), -1)

    def _gate_and_up_of(self, x: Tensor) -> Sequence[Tensor]:
        outputs = self._gate_and_up(x)
        return outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)

    def _add(self, module: Projections, y: Tensor, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """x + what the module makes of y, normalized or scaled before if the layer says so."""
        scale = self._settings.residual_scale
        if norm is None and scale == 1:
            return module.add_(y, x)
        projected = module(y)[0]
        return x + (projected * scale if norm is None else rms_norm(projected, norm))


def _normalized(norm: RMSNorm | None, x: Tensor) -> Tensor:
    """x [num_tokens, width], normalized in rows as wide as the norm, which may be those of heads."""
    return x if norm is None else rms_norm(x.view(-1, len(norm.weight)), norm).view(x.shape)
