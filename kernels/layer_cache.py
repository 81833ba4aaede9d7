"""Keys and values of one attention layer, in slots; natively in tiles of slots, as the kernels multiply them."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.native_library import native_library

MAX_NATIVE_DIM = 256
_TILE = 16  # slots


class _CacheTiles(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("keys", "values")),
        *((name, c_int64) for name in ("num_heads", "dim", "value_dim")),
    )


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values: [num_slots, kv_heads, dim] each, contiguous.

    `is_tiled`: their numbers lie as in `native/cache_tiles.h`, which only the native kernels understand.
    """

    keys: Tensor
    values: Tensor
    is_tiled: bool = False

    @classmethod
    def zeros(
        cls, like: Tensor, num_slots: int, block_size: int, sizes: tuple[int, int, int], pages: HugePages
    ) -> LayerCache:
        """A cache of so many heads, key dims and value dims, in these pages.

        Zeros, because a slot may be read, and masked, before it is written.
        """
        num_heads, key_dim, value_dim = sizes
        return cls(
            pages.zeros(like, num_slots, num_heads, key_dim),
            pages.zeros(like, num_slots, num_heads, value_dim),
            is_tiled=can_tile(like, block_size, key_dim, value_dim),
        )

    def store_(self, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Writes key and value [num_tokens, kv_heads, dim] to their slots [num_tokens].

        A request's tokens come in order, and fill a tile from its first slot on.
        """
        if not self.is_tiled:
            self.keys[slots] = key
            self.values[slots] = value
            return
        native = native_function("store_in_tiles", self.keys)
        assert native is not None, "tiles need the native kernels"
        key, value = key.contiguous(), value.contiguous()
        assert key.dtype == value.dtype == self.keys.dtype and slots.dtype == torch.long
        assert key.shape == (len(slots), *self.keys.shape[1:])
        assert value.shape == (len(slots), *self.values.shape[1:])
        _, num_heads, dim = self.keys.shape
        tiles = _CacheTiles(
            self.keys.data_ptr(), self.values.data_ptr(), num_heads, dim, self.values.shape[2]
        )
        pointers = (c_void_p(tensor.data_ptr()) for tensor in (key, value, slots))
        native(*pointers, c_int64(len(slots)), ctypes.byref(tiles))


def can_tile(like: Tensor, block_size: int, key_dim: int, value_dim: int) -> bool:
    """True if a cache of the type and device of `like` is to be tiled: bfloat16, where the processor takes pairs."""
    library = native_library()
    if library is None or like.dtype != torch.bfloat16:
        return False
    if like.device.type != "cpu" or uses_triton(like.device):
        return False
    fits = max(key_dim, value_dim) <= MAX_NATIVE_DIM and key_dim % 2 == 0 and block_size % _TILE == 0
    return fits and bool(library.has_cache_tiles())
