"""Rotary positions, and the best token.

    rotate  (a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of what is turned of a head, as in Llama
    argmax  the first place of max_i x_i

In Triton on a GPU; natively where there is a library and the type is float32 or bfloat16; else with torch's operations.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_call import native_function


@functools.cache
def in_triton() -> ModuleType:
    """The launches of pointwise kernels, imported only where they are used: a server on a CPU needs no Triton."""
    from fusionserve.kernels.device import pointwise_launch

    return pointwise_launch


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "cos", "sin", "keys", "values", "slots")),
        *(
            (name, c_int64)
            for name in ("num_tokens", "num_heads", "num_kv_heads", "dim", "turned", "is_tiled")
        ),
    )


class Angles(NamedTuple):
    """By how much the first `dim` numbers of a head are turned: cos and sin [num_tokens, dim], float32."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of the new tokens, and the slots [num_tokens] their keys go to."""

    angles: Angles
    slots: Tensor

    def __post_init__(self) -> None:
        for tensor in self.angles:
            assert tensor.dtype == torch.float32 and tensor.is_contiguous() and len(tensor) == len(self.slots)


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, rotation: Rotation
) -> Tensor:
    """Turned queries; turned keys and the values go to their slots of the cache.

    query [num_tokens, num_heads, dim], key and value [num_tokens, num_kv_heads, dim], contiguous; `query` may be
    written to.
    """
    keys, values, (cos, sin) = cache.keys, cache.values, rotation.angles
    if uses_triton(query.device):
        in_triton().rotate_and_store(query, key, value, keys, values, cos, sin, rotation.slots)
        return query
    native = native_function("rotate_and_store", query)
    if native is None:
        cache.store_(rotation.slots, rotated(key, rotation.angles), value)
        return rotated(query, rotation.angles)
    num_tokens, num_heads, dim = query.shape
    for tensor in (query, key, value, keys, values):
        assert tensor.dtype == query.dtype and tensor.shape[-1] == dim and tensor.is_contiguous()
    assert key.shape == value.shape == (num_tokens, keys.shape[1], dim) and keys.shape == values.shape
    turned = cos.shape[1]
    assert rotation.slots.shape == (num_tokens,) and turned <= dim and turned % 2 == 0
    tensors = (query, key, value, cos, sin, keys, values, rotation.slots)
    pointers = (tensor.data_ptr() for tensor in tensors)
    native(ctypes.byref(_Heads(*pointers, num_tokens, num_heads, key.shape[1], dim, turned, cache.is_tiled)))
    return query


def rotated(heads: Tensor, angles: Angles) -> Tensor:
    """heads [num_tokens, heads, dim] turned by the angles of their tokens."""
    dim = angles.cos.shape[1]
    own, rest = heads[..., :dim], heads[..., dim:]
    low, high = own.chunk(2, dim=-1)
    turned = own * angles.cos[:, None] + torch.cat((-high, low), dim=-1) * angles.sin[:, None]
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)


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
