"""Tensors that live as long as the server, side by side in memory that the system is asked to hold in huge pages.

Weights, keys and values, and rank rows are read from one end to the other in every step. In pages of 4 KiB a processor
looks up an address for every 64 lines of them, and does not read ahead over the end of a page; in pages of 2 MiB
that hardly counts (madvise(2), MADV_HUGEPAGE).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
import threading
from contextlib import suppress
from ctypes import c_int, c_size_t, c_void_p
from functools import cache

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 << 20
_LEAST = 64 << 20  # bytes of a mapping; it takes memory where it has been written to
_LINE = 64
_SMALL_PAGE = 4096
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which Python's mmap does not name; from Linux 5.14 on


class HugePages:
    """Gives out memory, never the same again; a mapping goes back to the system when nobody holds a tensor in it.

    Thread-safe.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rest = torch.empty(0, dtype=torch.uint8)

    def zeros(self, like: Tensor, *shape: int) -> Tensor:
        """Zeros of the type and device of `like`; for a GPU, or where there are no huge pages, as torch allocates them.

        Raises MemoryError if the system has none left.
        """
        num_bytes = math.prod(shape) * like.itemsize
        if like.device.type != "cpu" or num_bytes == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return like.new_zeros(shape)
        room = -(-num_bytes // _LINE) * _LINE
        with self._lock:
            if room > len(self._rest):
                self._rest = _map(max(room, _LEAST))
            taken, self._rest = self._rest[:num_bytes], self._rest[room:]
        return taken.view(like.dtype).view(shape)

    def copy(self, tensor: Tensor) -> Tensor:
        """A contiguous copy; raises MemoryError."""
        return self.zeros(tensor, *tensor.shape).copy_(tensor)


def touch_zeros(tensor: Tensor) -> None:
    """Has the system hand over the memory of contiguous zeros now, and not when they are first written to.

    It clears a page before, and may have to move others out of the way of a huge one, which takes milliseconds. A GPU's
    is there.
    """
    if tensor.device.type == "cpu":
        tensor.view(-1).view(torch.uint8)[::_SMALL_PAGE] = 0


def populate(tensor: Tensor) -> bool:
    """Like `touch_zeros` for part of a tensor of `HugePages` that others may be writing to: what is there stays.

    False if the system cannot do that, or has no memory left.
    """
    if not sys.platform.startswith("linux"):
        return False
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    num_bytes = tensor.data_ptr() + tensor.nbytes - begin
    advised: int = _libc().madvise(c_void_p(begin), c_size_t(num_bytes), c_int(_POPULATE_WRITE))
    return advised == 0


def new_mapping(num_bytes: int) -> mmap.mmap:
    """Private memory, zeros, that the system hands over where it is written to. Raises MemoryError."""
    try:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no room for {num_bytes} bytes") from error


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def _map(num_bytes: int) -> Tensor:
    """Zeros [num_bytes] from the beginning of a huge page on."""
    mapping = new_mapping(num_bytes + HUGE_PAGE_BYTES)
    with suppress(OSError):  # a kernel without them: the same memory in small pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE_BYTES
    return memory[start : start + num_bytes]
