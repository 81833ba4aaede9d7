"""Who may compute on several cores: the engine thread, and nobody beside it.

torch's operations share their work out by OpenMP, whose idle workers by default watch for more of it for milliseconds
and give the core to nobody meanwhile, neither to the native kernels' helpers nor to the event loop.
"""

from __future__ import annotations

import ctypes

import torch


def compute_alone() -> None:
    """Keeps torch's operations in the calling thread from taking others to help; for threads beside the engine's."""
    torch.get_num_threads()  # has torch set the thread up, which it does once, before we do
    set_num_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_num_threads is not None:
        set_num_threads(1)
