"""Decoder layers that follow one another, computed in one native call, or in one up to each mixture of experts.

Between two layers there is then no Python, which is a twentieth of a decoding step of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from fusionserve.adapters.adapted_linear import Projections
from fusionserve.adapters.fused_tokens import FusedSegment
from fusionserve.adapters.pool import ModuleRows
from fusionserve.adapters.row_plan import PlanCell, RowPlan
from fusionserve.engine.attention import AttentionBatch
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_layer import NativeLayer, NativeLayers
from fusionserve.kernels.rotation import Angles


class StackedLayer(Protocol):
    """What a stack asks of a layer."""

    groups: tuple[Projections, ...]
    cell: PlanCell
    has_mixture: bool

    def cache_in(self, batch: AttentionBatch) -> LayerCache:
        """The layer's keys and values."""

    def native_layer(self, cache: LayerCache) -> NativeLayer | None:
        """The layer over a cache in one kernel, up to a mixture; or None where there is none for all of it."""

    def add_mixture(self, x: Tensor) -> Tensor:
        """x with what the mixture of experts makes of it, for a layer that has one."""


class LayerStack:
    """Some layers, in order. They share a plan, and the angles they choose from."""

    def __init__(self, layers: Sequence[StackedLayer]) -> None:
        self._layers = tuple(layers)
        ends = {len(layers), *(number + 1 for number, layer in enumerate(layers) if layer.has_mixture)}
        self._calls = [range(start, end) for start, end in pairwise((0, *sorted(ends)))]
        self._cache: LayerCache | None = None  # the first layer's, which the native ones were made for
        self._native: NativeLayers | None = None
        self._rows: tuple[ModuleRows, ...] = ()
        # What the native layers' additions follow from: a number that grows with the pool's tensors, and fused tokens.
        self._source: tuple[int, tuple[FusedSegment, ...]] | None = None

    def compute_(self, x: Tensor, angles: Sequence[Angles], batch: AttentionBatch) -> Tensor | None:
        """The output of the last layer for x [num_tokens, hidden], whose memory may be its; None: not natively."""
        plan = self._layers[0].cell.plan
        native = self._native_layers(batch) if plan.is_segments_only else None
        if native is None:
            self._source = None  # layer by layer, fused tokens get other attentions
            return None
        self._set_additions(native, plan)
        segments = None if plan.segments is None else plan.segments.together
        step = batch.native_step(angles, segments)
        for layers in self._calls:
            native.compute_(x, step, layers)
            last = self._layers[layers[-1]]
            if last.has_mixture:
                x = last.add_mixture(x)
        return x

    def _native_layers(self, batch: AttentionBatch) -> NativeLayers | None:
        first = self._layers[0].cache_in(batch)
        if first is not self._cache:
            layers = [layer.native_layer(layer.cache_in(batch)) for layer in self._layers]
            all_native = [layer for layer in layers if layer is not None]
            is_whole = len(all_native) == len(layers)
            self._native = NativeLayers(all_native, first.keys) if is_whole else None
            self._cache, self._source = first, None
            groups = [group for layer in self._layers for group in layer.groups]
            self._rows = tuple(module.rows for group in groups for module in group.modules)
        return self._native

    def _set_additions(self, native: NativeLayers, plan: RowPlan) -> None:
        """Without segments they stay as they are: nothing is added to no tokens."""
        segments = plan.segments
        if segments is None:
            return
        # Attentions write to tensors of their fused tokens; all else changes only when the pool has other tensors.
        source = sum(rows.layout for rows in self._rows), segments.fused
        if source == self._source:
            return
        for layer, native_layer in zip(self._layers, native.layers, strict=True):
            native_layer.set_additions([group.additions(segments) for group in layer.groups])
        self._source = source
