"""Decoder layers in one call of a native kernel; see `native/decoder_layer.cpp`.

What it computes, and to the same bits, is what its kernels compute one by one; what it saves is everything in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

from torch import Tensor

from fusionserve.kernels.activations import Activation
from fusionserve.kernels.layer_cache import MAX_NATIVE_DIM, LayerCache
from fusionserve.kernels.linear_product import LinearProduct
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.norms import NativeNorm, Norm
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_batch import NativeAttention, native_sinks
from fusionserve.kernels.projections import NativeProjections
from fusionserve.kernels.rotation import Rotation
from fusionserve.kernels.segments import Additions, NativeSegment, Segments

_NO_ADDITIONS = Additions([])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorms:
    """The norms of a layer; None: it has no such one."""

    before_attention: Norm | None = None
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    query: Norm | None = None  # of each head, or of all heads together
    key: Norm | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSettings:
    """What a layer computes beside its MLP and its products."""

    norms: LayerNorms
    num_heads: int
    num_kv_heads: int
    head_dim: int
    options: AttentionOptions
    is_parallel: bool = False  # the MLP sees what attention sees, the layer's input
    head_groups: int = (
        1  # of one module of all heads, whose outputs are each group's queries, keys and values
    )
    residual_scale: float = 1.0  # of what attention and MLP add, if no norm follows them

    @property
    def head_widths(self) -> tuple[int, int, int]:
        """Of queries, keys and values."""
        kv_width = self.num_kv_heads * self.head_dim
        return self.num_heads * self.head_dim, kv_width, kv_width


@dataclass(frozen=True, slots=True)
class MLPSettings:
    """What stands between the products of a layer's MLP."""

    activation: Activation
    is_gated: bool  # down takes activation(gate x) * up x; else activation(up x)


# Queries, keys and values, or one module of all three; output; and if the layer has an MLP: gate and up, or one module
# of both, or up alone; down.
LayerProducts = Sequence[LinearProduct]
_MOST_PRODUCTS = 4


class _Layer(ctypes.Structure):
    _fields_ = (
        ("projections", NativeProjections * _MOST_PRODUCTS),
        ("norms", NativeNorm * 6),
        *((name, c_void_p) for name in ("keys", "values", "sinks")),
        *((name, c_int64) for name in ("num_heads", "num_kv_heads", "dim", "is_tiled", "window")),
        *((name, c_int64) for name in ("head_groups", "angles", "activation", "is_gated", "is_parallel")),
        *((name, c_float) for name in ("scale", "softcap", "residual_scale")),
    )


class _Angles(ctypes.Structure):
    _fields_ = (("cos", c_void_p), ("sin", c_void_p), ("dim", c_int64), ("by_neighbours", c_int64))


class _Step(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("angles", ctypes.POINTER(_Angles)),
        ("slots", c_void_p),
        ("attentions", ctypes.POINTER(NativeAttention)),
        ("num_attentions", c_int64),
        ("segments", ctypes.POINTER(NativeSegment)),
        ("num_segments", c_int64),
    )


class NativeStep:
    """What all layers of a step share: its tokens' places, what they attend to, and the segments of its adapters.

    Layers choose from the rotations, which have the same slots.
    """

    def __init__(
        self,
        rotations: Sequence[Rotation],
        attentions: Sequence[NativeAttention],
        segments: Segments | None,
    ) -> None:
        self._kept = rotations, attentions, segments  # the kernel has their addresses
        angles, slots = [rotation.angles for rotation in rotations], rotations[0].slots
        self.angle_dims = tuple(own.cos.shape[1] for own in angles)
        segment_array = (NativeSegment * 0)() if segments is None else segments.array
        self.arguments = _Step(
            len(slots),
            (_Angles * len(angles))(
                *(
                    _Angles(cos.data_ptr(), sin.data_ptr(), cos.shape[1], by_neighbours)
                    for cos, sin, by_neighbours in angles
                )
            ),
            slots.data_ptr(),
            (NativeAttention * len(attentions))(*attentions),
            len(attentions),
            segment_array,
            len(segment_array),
        )


class NativeLayer:
    """One layer over its cache, without its MLP if that is None; `angles` says which of the step's it takes."""

    def __init__(
        self,
        products: LayerProducts,
        settings: LayerSettings,
        mlp: MLPSettings | None,
        angles: int,
        cache: LayerCache,
    ) -> None:
        keys, values, options, norms = cache.keys, cache.values, settings.options, settings.norms
        for tensor in (keys, values):
            assert tensor.dtype == keys.dtype and tensor.is_contiguous()
        assert keys.shape == values.shape and keys.shape[1:] == (settings.num_kv_heads, settings.head_dim)
        self._kept = products, settings, keys, values  # the kernel has their addresses
        self._additions: tuple[Additions, ...] = ()
        self._num_products = len(products)
        self.dtype, self.hidden = keys.dtype, products[1].parts[0].d_out
        _check_widths(products, settings, mlp)
        places = (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp)
        self.arguments = _Layer(
            (NativeProjections * _MOST_PRODUCTS)(
                *(NativeProjections.of(product, keys) for product in products)
            ),
            (NativeNorm * 6)(
                *(NativeNorm.of(norm, keys.dtype) for norm in (*places, norms.query, norms.key))
            ),
            keys.data_ptr(),
            values.data_ptr(),
            native_sinks(options, settings.num_heads),
            settings.num_heads,
            settings.num_kv_heads,
            settings.head_dim,
            cache.is_tiled,
            options.sliding_window or 0,
            settings.head_groups,
            angles,
            Activation.SILU if mlp is None else mlp.activation,
            mlp is not None and mlp.is_gated,
            settings.is_parallel,
            options.softmax_scale,
            options.softcap or 0.0,
            settings.residual_scale,
        )

    @staticmethod
    def can_compute(products: LayerProducts, settings: LayerSettings, like: Tensor) -> bool:
        """True if there are native kernels for all of it, in the type and on the device of `like`."""
        has_layer = (
            native_function("decoder_layers", like) is not None and settings.head_dim <= MAX_NATIVE_DIM
        )
        return has_layer and all(product.native(like) is not None for product in products)

    def set_additions(self, additions: Sequence[Additions]) -> None:
        """What adapters add to the products from now on: one for each, or none at all."""
        self._additions = tuple(additions)  # the kernel has their addresses
        for index in range(self._num_products):
            self.arguments.projections[index].set_additions(additions[index] if additions else _NO_ADDITIONS)


def _check_widths(products: LayerProducts, settings: LayerSettings, mlp: MLPSettings | None) -> None:
    """The kernel computes addresses from them."""
    heads, output, *own = ([part.d_out for part in product.parts] for product in products)
    hidden, norms = output[0], settings.norms
    assert sum(heads) == sum(settings.head_widths) and len(heads) in (1, 3) and output == [hidden]
    assert settings.num_kv_heads % settings.head_groups == 0 and bool(own) == (mlp is not None)
    if mlp is not None:
        inner, down = own
        assert down == output and (len(inner) == 1 or (mlp.is_gated and inner[0] == inner[1]))
    for norm in (norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp):
        assert norm is None or norm.weight.shape == (hidden,)
    for norm, width in zip((norms.query, norms.key), settings.head_widths, strict=False):
        assert norm is None or norm.weight.shape in ((settings.head_dim,), (width,))


class NativeLayers:
    """Layers that follow one another."""

    def __init__(self, layers: Sequence[NativeLayer], like: Tensor) -> None:
        native = native_function("decoder_layers", like)
        assert native is not None, "native layers need the native kernel"
        assert len({(layer.dtype, layer.hidden) for layer in layers}) == 1
        self._native = native
        self.layers = tuple(layers)
        self._dtype, self._hidden = layers[0].dtype, layers[0].hidden
        self._head_dim = min(layer.arguments.dim for layer in layers)
        self._num_angles = 1 + max(layer.arguments.angles for layer in layers)
        self._pointers = (ctypes.POINTER(_Layer) * len(layers))(
            *(ctypes.pointer(layer.arguments) for layer in layers)
        )

    def compute_(self, x: Tensor, step: NativeStep, which: range) -> None:
        """x [num_tokens, hidden] becomes the output of the last of these layers."""
        assert x.dtype == self._dtype and x.is_contiguous()
        assert x.shape == (step.arguments.num_tokens, self._hidden)
        assert all(dim % 2 == 0 and dim <= self._head_dim for dim in step.angle_dims)
        assert self._num_angles <= len(step.angle_dims)
        assert which.step == 1 and 0 <= which.start <= which.stop <= len(self.layers)
        first = ctypes.byref(self._pointers, which.start * ctypes.sizeof(c_void_p))
        self._native(first, c_int64(len(which)), ctypes.byref(step.arguments), c_void_p(x.data_ptr()))
