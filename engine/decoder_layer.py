"""Decoder layers in few, large steps: same weights, same result, a fifth of the operations or less.

Where native kernels do all of it, all layers are one call (`layer_stack.py`). Else queries, keys and values are one
product, gate and up another, and a residual is added by the product before it. That is also how adapters are served
that say more than rank rows in segments. On a GPU one product is for weights of 8 or 4 bits; others have one for each
module.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusionserve.adapters.adapted_linear import Projections
from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.layer_form import DenseMLP, LayerForm
from fusionserve.kernels.activations import activate, gated_product
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_layer import NativeLayer
from fusionserve.kernels.norms import Norm, normalize
from fusionserve.kernels.rotation import Angles


class DecoderLayer:
    """Computes what the layer of transformers computes whose form it has, with that layer's modules.

    `angles` says which of the model's it turns queries and keys by.
    """

    def __init__(self, form: LayerForm, angles: int) -> None:
        self._attention, self._settings, self._angles = form.attention, form.settings, angles
        assert form.settings.norms.before_mlp or not form.settings.is_parallel, (
            "the MLP's input must be its own"
        )
        self._heads, self._output = Projections(form.heads), Projections([form.output])
        self._mlp = _MLPProducts(form.mlp) if isinstance(form.mlp, DenseMLP) else None
        self._mixture = None if isinstance(form.mlp, DenseMLP) else form.mlp
        own = () if self._mlp is None else self._mlp.groups
        self.groups: tuple[Projections, ...] = (self._heads, self._output, *own)
        self.has_mixture = self._mixture is not None
        self.cell = form.output.cell

    def compute(self, x: Tensor, angles: Sequence[Angles], batch: AttentionBatch) -> Tensor:
        """x [num_tokens, hidden] -> that shape, maybe that memory."""
        norms, mlp = self._settings.norms, self._mlp
        for_mlp = _normalized(norms.before_mlp, x) if self._settings.is_parallel else None
        attended = self._attend(_normalized(norms.before_attention, x), angles[self._angles], batch)
        x = self._add_product(self._output, attended, x, norms.after_attention)
        if mlp is None:
            return self.add_mixture(x)
        # Of a parallel layer, too, behind its attention, where a fusion may have its weights from.
        inner = mlp.inner(_normalized(norms.before_mlp, x) if for_mlp is None else for_mlp)
        return self._add_product(mlp.down, inner, x, norms.after_mlp)

    def add_mixture(self, x: Tensor) -> Tensor:
        """x with what the mixture of experts makes of it, for a layer that has one."""
        assert self._mixture is not None
        norms = self._settings.norms
        mixed: Tensor = self._mixture(_normalized(norms.before_mlp, x)[None])[0]
        return self._add(mixed, x, norms.after_mlp)

    def cache_in(self, batch: AttentionBatch) -> LayerCache:
        """The layer's keys and values."""
        return batch.cache_of(self._attention)

    def native_layer(self, cache: LayerCache) -> NativeLayer | None:
        """The layer over a cache in one kernel, up to a mixture; or None where there is none for all of it."""
        products = [group.product for group in self.groups]
        known = [product for product in products if product is not None]
        if len(known) < len(products) or not NativeLayer.can_compute(known, self._settings, cache.keys):
            return None
        mlp = None if self._mlp is None else self._mlp.settings
        return NativeLayer(known, self._settings, mlp, self._angles, cache)

    def _attend(self, x: Tensor, angles: Angles, batch: AttentionBatch) -> Tensor:
        settings, outputs = self._settings, self._heads(x)
        if len(outputs) == 1:
            groups = settings.head_groups
            widths = [width // groups for width in settings.head_widths]
            parts = torch.split(outputs[0].view(len(x), groups, -1), widths, dim=-1)
            outputs = [part.reshape(len(x), -1).contiguous() for part in parts]
        query, key, value = outputs
        query, key = _normalized(settings.norms.query, query), _normalized(settings.norms.key, key)
        query, key, value = (y.view(len(x), -1, settings.head_dim) for y in (query, key, value))
        heads = query, key, value
        attended = batch.rotate_and_attend(self._attention, heads, angles, settings.options)
        return attended.view(len(x), -1)

    def _add_product(self, module: Projections, y: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
        """x + what the module makes of y, normalized or scaled before if the layer says so."""
        if norm is None and self._settings.residual_scale == 1:
            return module.add_(y, x)
        return self._add(module(y)[0], x, norm)

    def _add(self, y: Tensor, x: Tensor, norm: Norm | None) -> Tensor:
        scale = self._settings.residual_scale
        if norm is not None:
            return x + normalize(y, norm)
        return x + (y if scale == 1 else y * scale)


class _MLPProducts:
    def __init__(self, form: DenseMLP) -> None:
        self._inner, self.down = Projections(form.inner), Projections([form.down])
        self.groups = (self._inner, self.down)
        self.settings = form.settings

    def inner(self, x: Tensor) -> Tensor:
        """What `down` takes."""
        outputs, settings = self._inner(x), self.settings
        if not settings.is_gated:
            return activate(settings.activation, outputs[0])
        gate, up = outputs if len(outputs) == 2 else outputs[0].chunk(2, dim=-1)
        return gated_product(settings.activation, gate, up)


def _normalized(norm: Norm | None, x: Tensor) -> Tensor:
    """x [num_tokens, width], normalized in rows as wide as the norm, which may be those of heads."""
    return x if norm is None else normalize(x.view(-1, len(norm.weight)), norm).view(x.shape)
