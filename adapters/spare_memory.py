"""Memory for the next adapter, which the system has handed over before a request waits for it.

New memory is cleared page by page when it is first written to, which takes as long as copying an adapter there. So a
piece as large as the last one is kept: one that was let go, or a new one that a thread gets.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from fusionserve.kernels.huge_pages import new_mapping, populate
from fusionserve.kernels.threads import borrowed_core

_PAUSE_S = 0.1  # until the request that a load was for is likely to have its first token
_BORROWED_S = 0.05  # at most: pages of an adapter are cleared in a few milliseconds


class SpareMemory:
    """Gives out pieces of memory, which come back when nobody holds a tensor in them; it keeps one to give out again.

    It keeps none larger than `most_kept_bytes`. Thread-safe.
    """

    def __init__(self, most_kept_bytes: int) -> None:
        self._most_kept_bytes = most_kept_bytes
        # A tensor may be let go anywhere, also while a lock is held: a deque's operations are atomic.
        self._kept: deque[mmap.mmap] = deque(maxlen=1)
        self._last_bytes = 0

    def take(self, num_bytes: int) -> Tensor:
        """Memory, uint8 [num_bytes], from the beginning of a page on, with anything in it. Raises MemoryError."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        self._last_bytes = num_bytes
        memory = self._take_kept(num_bytes) or new_mapping(num_bytes)
        view = memoryview(memory)  # what the tensor, and whatever is made of it, holds on to
        weakref.finalize(view, self._keep, memory).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8)

    def refill_soon(self) -> None:
        """Has a piece like the last one at hand in a moment, unless one is let go before."""
        timer = threading.Timer(_PAUSE_S, self._refill)
        timer.daemon, timer.name = True, "spare-memory"
        timer.start()

    @property
    def kept_bytes(self) -> int:
        """Bytes that are at hand."""
        return sum(map(len, self._kept))

    def _take_kept(self, num_bytes: int) -> mmap.mmap | None:
        try:
            memory = self._kept.pop()
        except IndexError:
            return None
        return memory if len(memory) == num_bytes else None  # `_last_bytes` may be another load's by now

    def _keep(self, memory: mmap.mmap) -> None:
        if len(memory) == self._last_bytes <= self._most_kept_bytes:
            self._kept.append(memory)

    def _refill(self) -> None:
        num_bytes = self._last_bytes
        if self._kept or not 0 < num_bytes <= self._most_kept_bytes:
            return
        try:
            memory = new_mapping(num_bytes)
        except MemoryError:  # then the next load says so
            return
        with borrowed_core(_BORROWED_S):
            if populate(torch.frombuffer(memory, dtype=torch.uint8)):
                self._keep(memory)
