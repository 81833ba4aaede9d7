"""Rotary positions: pairs of a head's numbers are turned, (a, b) -> (a cos - b sin, b cos + a sin).

A pair is a number of the first half of what is turned and its counterpart in the second, as in Llama, or two
neighbours, as in Su et al. 2021 (RoFormer, arXiv:2104.09864). In Triton on a GPU; natively where there is a library
that takes the type; else with torch's operations.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fusionserve.kernels.device.launches import pointwise_launches
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_call import native_function


class _Heads(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("query", "key", "value", "cos", "sin", "keys", "values", "slots")),
        *(
            (name, c_int64)
            for name in (
                "num_tokens",
                "num_heads",
                "num_kv_heads",
                "dim",
                "turned",
                "is_tiled",
                "by_neighbours",
            )
        ),
    )


class Angles(NamedTuple):
    """By how much the first `dim` numbers of a head are turned: cos and sin [num_tokens, dim], float32.

    Both halves of a row are those of the pairs in order, which may be neighbours.
    """

    cos: Tensor
    sin: Tensor
    by_neighbours: bool = False


@dataclass(frozen=True, slots=True)
class Rotation:
    """The angles of the new tokens, and the slots [num_tokens] their keys go to."""

    angles: Angles
    slots: Tensor

    def __post_init__(self) -> None:
        for tensor in self.angles[:2]:
            assert tensor.dtype == torch.float32 and tensor.is_contiguous() and len(tensor) == len(self.slots)


def rotate_and_store(
    query: Tensor, key: Tensor, value: Tensor, cache: LayerCache, rotation: Rotation
) -> Tensor:
    """Turned queries; turned keys and the values go to their slots of the cache.

    query [num_tokens, num_heads, dim], key and value [num_tokens, num_kv_heads, dim], contiguous; `query` may be
    written to.
    """
    keys, values, (cos, sin, by_neighbours) = cache.keys, cache.values, rotation.angles
    if uses_triton(query.device):
        pointwise_launches().rotate_and_store(
            query, key, value, keys, values, cos, sin, rotation.slots, by_neighbours
        )
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
    sizes = (num_tokens, num_heads, key.shape[1], dim, turned)
    native(ctypes.byref(_Heads(*pointers, *sizes, cache.is_tiled, by_neighbours)))
    return query


def rotated(heads: Tensor, angles: Angles) -> Tensor:
    """heads [num_tokens, heads, dim] turned by the angles of their tokens."""
    dim = angles.cos.shape[1]
    own, rest = heads[..., :dim], heads[..., dim:]
    if angles.by_neighbours:
        own = torch.cat((own[..., 0::2], own[..., 1::2]), dim=-1)
    low, high = own.chunk(2, dim=-1)
    turned = own * angles.cos[:, None] + torch.cat((-high, low), dim=-1) * angles.sin[:, None]
    if angles.by_neighbours:
        turned = torch.stack(turned.chunk(2, dim=-1), dim=-1).flatten(-2)
    return torch.cat((turned.to(heads.dtype), rest), dim=-1)
