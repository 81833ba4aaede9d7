"""Telling exceptions of torch and Triton apart: out of memory, the device gone, or anything else."""

from __future__ import annotations

import torch

# torch's CPU allocator has no exception of its own (c10/core/impl/alloc_cpu.cpp), nor have pinned memory, graphs,
# libraries and Triton.
_NO_MEMORY = (
    "can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation

# Those of cudaError_t after which, by CUDA's manual, the process must end, and those of a device that is not there.
_STICKY = frozenset({3, 4, 46, 100, 201, 214, 220, 226, 700, 702, 709, 710, *range(714, 720), 721, 999})

# Triton raises a RuntimeError with CUDA's words.
_TRITON = "Triton Error [CUDA]: "
_STICKY_WORDS = (
    "an illegal memory access was encountered",
    "the launch timed out and was terminated",
    "device-side assert triggered",
    "hardware stack error",
    "an illegal instruction was encountered",
    "misaligned address",
    "invalid program counter",
    "unspecified launch failure",
    "uncorrectable ECC error encountered",
    "context is destroyed",
    "unknown error",
)


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation failed, on the host or on the device: with less to hold the same work may succeed."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if _code(error) == _OUT_OF_MEMORY:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """True if the accelerator failed: every later call fails too, and only a new process can use it.

    False for what it refuses, such as a launch of the wrong size or a call that a recording does not allow.
    """
    if isinstance(error, torch.AcceleratorError):
        code = _code(error)
        return not is_out_of_memory(error) if code is None else code in _STICKY
    text = str(error) if isinstance(error, RuntimeError) else ""
    return text.startswith(_TRITON) and any(words in text for words in _STICKY_WORDS)


def _code(error: BaseException) -> int | None:
    """cudaError_t, which torch puts beside the words."""
    return getattr(error, "error_code", None) if isinstance(error, torch.AcceleratorError) else None
