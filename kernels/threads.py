"""Who may compute on several cores: the engine thread, and nobody beside it.

torch's operations share their work out by OpenMP, whose idle workers by default watch for more of it for milliseconds
and give the core to nobody meanwhile, neither to the native kernels' helpers nor to the event loop.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusionserve.kernels.cores import num_cores
from fusionserve.kernels.native_library import native_library

_CORES_A_TURN = 4  # with so many, a second core is lent


_turns = threading.Semaphore(max(1, num_cores() // _CORES_A_TURN))


def compute_alone() -> None:
    """Keeps torch's operations in the calling thread from taking others to help; for threads beside the engine's."""
    torch.get_num_threads()  # has torch set the thread up, which it does once, before we do
    set_num_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_num_threads is not None:
        set_num_threads(1)


@contextmanager
def borrowed_core(at_most_s: float) -> Iterator[None]:
    """Has the native kernels do without one of their helpers while the block computes, at most so long.

    The engine goes on with the cores that are left. Without this it stops whenever the system gives a helper's core to
    the block in the middle of a piece of work, and with memory to read one core of two does more than half. Where cores
    are few, blocks take turns: side by side, two would both be done when the second one is, and take two cores. A block
    that is not done in its time waits for a disk, and the next one does not wait for that.
    """
    library = native_library()
    if library is None:
        yield
        return
    is_in_turn = _turns.acquire(timeout=at_most_s)
    library.lend_core(ctypes.c_int64(round(at_most_s * 1e6)))
    try:
        yield
    finally:
        library.take_core_back()
        if is_in_turn:
            _turns.release()
