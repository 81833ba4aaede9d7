"""Decoder layers of the Llama family in one call of a native kernel; see `native/decoder_layer.cpp`.

What it computes, and to the same bits, is what its kernels compute one by one; what it saves is everything in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

from fusionserve.kernels.layer_cache import MAX_NATIVE_DIM, LayerCache
from fusionserve.kernels.linear_product import LinearProduct
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_batch import NativeAttention
from fusionserve.kernels.pointwise import Rotation
from fusionserve.kernels.projections import NativeProjections
from fusionserve.kernels.segments import Additions, NativeSegment, Segments

_NO_ADDITIONS = Additions([])


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """The weight [width] and epsilon of an RMSNorm."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """What a layer is made of. Products: queries, keys and values; output; gate and up; down."""

    products: tuple[LinearProduct, LinearProduct, LinearProduct, LinearProduct]
    input_norm: LayerNorm
    inner_norm: LayerNorm
    query_norm: LayerNorm | None
    key_norm: LayerNorm | None
    head_dim: int
    options: AttentionOptions


class _Norm(ctypes.Structure):
    _fields_ = (("weight", c_void_p), ("epsilon", c_float))


class _Layer(ctypes.Structure):
    _fields_ = (
        ("projections", NativeProjections * 4),
        ("norms", _Norm * 4),
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("dim", "is_tiled", "window")),
        ("scale", c_float),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        *((name, c_void_p) for name in ("cos", "sin", "slots")),
        ("attentions", ctypes.POINTER(NativeAttention)),
        ("num_attentions", c_int64),
        ("segments", ctypes.POINTER(NativeSegment)),
        ("num_segments", c_int64),
    )


class NativeStep:
    """What all layers of a step share: its tokens' places, what they attend to, and the segments of its adapters."""

    def __init__(
        self, rotation: Rotation, attentions: Sequence[NativeAttention], segments: Segments | None
    ) -> None:
        for tensor in (rotation.cos, rotation.sin):
            assert tensor.is_contiguous() and len(tensor) == len(rotation.slots)
        self._kept = rotation, attentions, segments  # the kernel has their addresses
        self.rotation = rotation
        segment_array = (NativeSegment * 0)() if segments is None else segments.array
        self.arguments = _Step(
            len(rotation.slots),
            rotation.cos.data_ptr(),
            rotation.sin.data_ptr(),
            rotation.slots.data_ptr(),
            (NativeAttention * len(attentions))(*attentions),
            len(attentions),
            segment_array,
            len(segment_array),
        )


class NativeLayer:
    """One layer over its cache."""

    def __init__(self, parts: LayerParts, cache: LayerCache) -> None:
        keys, values = cache.keys, cache.values
        norms = (parts.input_norm, parts.inner_norm, parts.query_norm, parts.key_norm)
        weights = [norm.weight for norm in norms if norm is not None]
        dtype = keys.dtype
        for tensor in (*weights, keys, values):
            assert tensor.dtype == dtype and tensor.is_contiguous()
        assert keys.shape == values.shape and keys.shape[2] == parts.head_dim
        self._kept = parts, keys, values  # the kernel has their addresses
        self._additions: tuple[Additions, ...] = ()
        self.dtype, self.hidden = dtype, len(parts.input_norm.weight)
        self.arguments = _Layer(
            (NativeProjections * 4)(*(NativeProjections.of(product, keys) for product in parts.products)),
            (_Norm * 4)(*map(_to_norm, norms)),
            keys.data_ptr(),
            values.data_ptr(),
            parts.head_dim,
            cache.is_tiled,
            parts.options.sliding_window or 0,
            parts.options.softmax_scale,
        )

    @staticmethod
    def can_compute(parts: LayerParts, like: Tensor) -> bool:
        """True if there are native kernels for all of it, in the type and on the device of `like`."""
        has_layer = native_function("decoder_layers", like) is not None and parts.head_dim <= MAX_NATIVE_DIM
        return has_layer and all(product.native(like) is not None for product in parts.products)

    def set_additions(self, additions: Sequence[Additions]) -> None:
        """What adapters add to the products from now on: one for each, or none at all."""
        self._additions = tuple(additions)  # the kernel has their addresses
        for index in range(4):
            self.arguments.projections[index].set_additions(additions[index] if additions else _NO_ADDITIONS)


class NativeLayers:
    """Layers that follow one another."""

    def __init__(self, layers: Sequence[NativeLayer], like: Tensor) -> None:
        native = native_function("decoder_layers", like)
        assert native is not None, "native layers need the native kernel"
        assert len({(layer.dtype, layer.hidden) for layer in layers}) == 1
        self._native = native
        self.layers = tuple(layers)
        self._dtype, self._hidden = layers[0].dtype, layers[0].hidden
        self._pointers = (ctypes.POINTER(_Layer) * len(layers))(
            *(ctypes.pointer(layer.arguments) for layer in layers)
        )

    def compute_(self, x: Tensor, step: NativeStep) -> None:
        """x [num_tokens, hidden] becomes the output of the last layer."""
        assert x.dtype == step.rotation.cos.dtype == self._dtype and x.is_contiguous()
        assert x.shape == (step.arguments.num_tokens, self._hidden)
        count, arguments = c_int64(len(self.layers)), ctypes.byref(step.arguments)
        self._native(self._pointers, count, arguments, c_void_p(x.data_ptr()))


def _to_norm(norm: LayerNorm | None) -> _Norm:
    return _Norm(None, 0.0) if norm is None else _Norm(norm.weight.data_ptr(), norm.epsilon)
