"""Telling exceptions of torch apart: out of memory, the device gone, or anything else."""

from __future__ import annotations

import torch

# torch's CPU allocator has no exception of its own (c10/core/impl/alloc_cpu.cpp).
_CPU_ALLOCATOR = "can't allocate memory"


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed, on the host or on the device: with less to hold the same work may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def is_device_lost(error: BaseException) -> bool:
    """True if the accelerator failed: every later call fails too, and only a new process can use it."""
    return isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error)
