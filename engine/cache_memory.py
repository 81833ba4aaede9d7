"""Gets the KV cache's memory from the system while the first requests run, and not when a step first writes to it.

The system clears a page before it gives it away, and a virtual machine may have to ask its host for it: a huge page can
take milliseconds, and one step may begin a page in many layers. Free blocks are given out by turns, so a server that
runs for a while writes to all of its cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from fusionserve.engine.memory_ahead import MemoryAhead, Piece
from fusionserve.kernels.huge_pages import HUGE_PAGE_BYTES, populate
from fusionserve.kernels.layer_cache import LayerCache


class CacheMemory(MemoryAhead):
    """The memory of these layers' keys and values. On a GPU it is there from the beginning, and nothing is done."""

    def __init__(self, caches: Iterable[LayerCache]) -> None:
        super().__init__("kv-cache-memory")
        tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        self._tensors = [tensor for tensor in tensors if tensor.device.type == "cpu"]

    def _pieces(self) -> Iterator[Piece]:
        """The slots that are written first in all layers, then the next ones."""
        num_slots = max((len(tensor) for tensor in self._tensors), default=0)
        widest = max((tensor[0].nbytes for tensor in self._tensors if len(tensor)), default=1)
        at_once = max(1, HUGE_PAGE_BYTES // widest)
        for start in range(0, num_slots, at_once):
            for tensor in self._tensors:
                yield partial(populate, tensor[start : start + at_once])
