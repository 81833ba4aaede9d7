"""Who may compute on several cores: the engine thread, and nobody beside it.

torch's operations share their work out by OpenMP, whose idle workers by default watch for more of it for milliseconds
and give the core to nobody meanwhile, neither to the native kernels' helpers nor to the event loop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fusionserve.kernels.native_library import native_library


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
    the block in the middle of a piece of work, and with memory to read one core of two does more than half.
    """
    library = native_library()
    if library is None:
        yield
        return
    library.lend_core(ctypes.c_int64(round(at_most_s * 1e6)))
    try:
        yield
    finally:
        library.take_core_back()
