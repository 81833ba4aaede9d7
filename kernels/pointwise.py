"""What stands between the products of a model: norms, rotary positions, gated activations, the best token.

    rms_norm      y = x / sqrt(mean(x^2) + eps) * w
    silu_product  y = silu(g) * u
    rotate        (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of a head, as in Llama
    argmax        the first place of max_i x_i

In Triton on a GPU; natively where there is a library and the type is float32 or bfloat16; else with torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_call import native_function


@functools.cache
def _in_triton() -> ModuleType:
    """Imported only where it is used: a server on a CPU needs no Triton."""
    from fusionserve.kernels.device import pointwise_launch

    return pointwise_launch


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., width], weight [width] -> like x."""
    if uses_triton(x.device) and weight.dtype == x.dtype:
        normalized: Tensor = _in_triton().rms_norm(x.contiguous(), weight, epsilon)
        return normalized
    native = native_function("rms_norm", x) if weight.dtype == x.dtype else None
    if native is None:
        return reference_rms_norm(x, weight, epsilon)
    x, width = x.contiguous(), x.shape[-1]
    assert weight.shape == (width,) and weight.is_contiguous()
    y = torch.empty_like(x)
    pointers = c_void_p(x.data_ptr()), c_void_p(weight.data_ptr()), c_void_p(y.data_ptr())
    native(*pointers, c_int64(x.numel() // width), c_int64(width), c_float(epsilon))
    return y


def reference_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """The definition, normalized in float32."""
    wide = x.float()
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * normalized.to(x.dtype)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape -> silu(gate) * up."""
    if uses_triton(gate.device):
        product: Tensor = _in_triton().silu_product(gate.contiguous(), up.contiguous())
        return product
    native = native_function("silu_product", gate)
    if native is None:
        return functional.silu(gate) * up
    assert up.shape == gate.shape and up.dtype == gate.dtype
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    native(c_void_p(gate.data_ptr()), c_void_p(up.data_ptr()), c_void_p(y.data_ptr()), c_int64(gate.numel()))
    return y


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "cos", "sin", "keys", "values", "slots")),
        *((name, c_int64) for name in ("num_tokens", "num_heads", "num_kv_heads", "dim", "is_tiled")),
    )


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of the new tokens, cos and sin [num_tokens, dim], and the slots [num_tokens] their keys go to."""

    cos: Tensor
    sin: Tensor
    slots: Tensor


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, rotation: Rotation
) -> Tensor:
    """Turned queries; turned keys and the values go to their slots of the cache.

    query [num_tokens, num_heads, dim], key and value [num_tokens, num_kv_heads, dim], contiguous; `query` may be
    written to.
    """
    keys, values = cache.keys, cache.values
    if uses_triton(query.device):
        _in_triton().rotate_and_store(
            query, key, value, keys, values, rotation.cos, rotation.sin, rotation.slots
        )
        return query
    native = native_function("rotate_and_store", query)
    if native is None:
        cache.store_(rotation.slots, rotated(key, rotation), value)
        return rotated(query, rotation)
    num_tokens, num_heads, dim = query.shape
    tensors = (query, key, value, rotation.cos, rotation.sin, keys, values, rotation.slots)
    for tensor in tensors[:-1]:
        assert tensor.dtype == query.dtype and tensor.shape[-1] == dim and tensor.is_contiguous()
    assert key.shape == value.shape == (num_tokens, keys.shape[1], dim) and keys.shape == values.shape
    assert rotation.slots.shape == (num_tokens,) and len(rotation.cos) == len(rotation.sin) == num_tokens
    pointers = (tensor.data_ptr() for tensor in tensors)
    native(ctypes.byref(_Heads(*pointers, num_tokens, num_heads, key.shape[1], dim, cache.is_tiled)))
    return query


def rotated(heads: Tensor, rotation: Rotation) -> Tensor:
    """heads [num_tokens, heads, dim] turned by the angles of their tokens."""
    low, high = heads.chunk(2, dim=-1)
    turned = torch.cat((-high, low), dim=-1)
    return heads * rotation.cos[:, None] + turned * rotation.sin[:, None]


def argmax(x: Tensor) -> Tensor:
    """The first place of the largest number of each row of x [rows, width]; -1 if it is not finite or one is NaN."""
    native = native_function("argmax", x)
    if native is None:
        found = x.float().max(dim=-1)
        return found.indices.masked_fill(~found.values.isfinite(), -1)
    x = x.contiguous()
    num_rows, width = x.shape
    places = torch.empty(num_rows, dtype=torch.long)
    native(c_void_p(x.data_ptr()), c_int64(num_rows), c_int64(width), c_void_p(places.data_ptr()))
    return places
