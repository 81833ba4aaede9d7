"""Gets the KV cache's memory from the system while the first requests run, and not when a step first writes to it.

The system clears a page before it gives it away, and a virtual machine may have to ask its host for it: a huge page can
take milliseconds, and one step may begin a page in many layers. Free blocks are given out by turns, so a server that
runs for a while writes to all of its cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from fusionserve.kernels.huge_pages import HUGE_PAGE_BYTES, populate
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.threads import borrowed_core

_BORROWED_S = 0.02  # at most, for a few pages


class CacheMemory:
    """The memory of these layers' keys and values. On a GPU it is there from the beginning, and nothing is done."""

    def __init__(self, caches: Iterable[LayerCache]) -> None:
        tensors = [tensor for cache in caches for tensor in (cache.keys, cache.values)]
        self._tensors = [tensor for tensor in tensors if tensor.device.type == "cpu"]
        self._is_stopped = threading.Event()

    def get_soon(self) -> None:
        """Begins on a thread of its own, with the slots that are written first."""
        threading.Thread(target=self._get, name="kv-cache-memory", daemon=True).start()

    def stop(self) -> None:
        """Has the thread end with the piece at hand."""
        self._is_stopped.set()

    def _get(self) -> None:
        num_slots = max((len(tensor) for tensor in self._tensors), default=0)
        widest = max((tensor[0].nbytes for tensor in self._tensors if len(tensor)), default=1)
        at_once = max(1, HUGE_PAGE_BYTES // widest)
        for start in range(0, num_slots, at_once):
            for tensor in self._tensors:
                with borrowed_core(_BORROWED_S):
                    if self._is_stopped.is_set() or not populate(tensor[start : start + at_once]):
                        return
