"""Gets memory from the system while the first requests run, and not when one of them waits for it."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from fusionserve.kernels.threads import borrowed_core

_BORROWED_S = 0.02  # at most, for a piece

Piece = Callable[[], bool]  # gets some memory; False if there is none left


class MemoryAhead(ABC):
    """Memory that is got piece by piece, on a thread named `thread_name`."""

    def __init__(self, thread_name: str) -> None:
        self._thread_name = thread_name
        self._is_stopped = threading.Event()

    @abstractmethod
    def _pieces(self) -> Iterator[Piece]:
        """In the order in which they are needed."""

    def get_soon(self) -> None:
        """Begins."""
        threading.Thread(target=self._get, name=self._thread_name, daemon=True).start()

    def stop(self) -> None:
        """Has the thread end with the piece at hand."""
        self._is_stopped.set()

    def _get(self) -> None:
        for piece in self._pieces():
            with borrowed_core(_BORROWED_S):
                if self._is_stopped.is_set() or not piece():
                    return
