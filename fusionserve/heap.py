"""What only glibc has to say about the heap of C, where there is glibc."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # glibc's numbers for `set_option`

_FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # glibc's names


class _HeapInfo(ctypes.Structure):
    """`struct mallinfo2`."""

    _fields_ = [(name, ctypes.c_size_t) for name in _FIELDS.split()]
    hblkhd: int  # bytes in blocks with mappings of their own
    uordblks: int  # bytes in use in heaps


def set_option(option: int, value: int) -> None:
    """mallopt(3)."""
    if (function := _function("mallopt")) is not None:
        function(option, value)


def trim() -> None:
    """malloc_trim(3): gives all pages that hold nothing back to the system, those between blocks in use, too."""
    if (function := _function("malloc_trim")) is not None:
        function(0)


def used_bytes() -> int | None:
    """mallinfo2(3): bytes that are allocated and not freed; None where nobody tells, as before glibc 2.33."""
    function = _function("mallinfo2")
    if function is None:
        return None
    function.restype = _HeapInfo
    info: _HeapInfo = function()
    return info.uordblks + info.hblkhd


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
