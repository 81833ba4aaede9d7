"""Who may compute on several cores: the engine thread, and nobody beside it.

OpenMP gives every thread that computes a pool of its own. Once the pools together have more threads than there are
cores, an idle worker goes to sleep at once instead of waiting for the next piece of work, and waking it costs 40 us,
more than most operations of a decoding step take.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def compute_alone() -> None:
    """Keeps torch's operations in the calling thread from taking others to help; for threads beside the engine's."""
    torch.get_num_threads()  # has torch set the thread up, which it does once, before we do
    set_num_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_num_threads is not None:
        set_num_threads(1)


def call_in_passing_thread(function: Callable[[], _Result]) -> _Result:
    """Calls `function` on several cores, and leaves no pool of threads behind: it ends with the thread that made it."""
    with ThreadPoolExecutor(1, thread_name_prefix="loading") as executor:
        return executor.submit(function).result()
