"""The most memory a run took."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures from its creation on, where the system can forget the peak so far; else since the process began."""

    def __init__(self) -> None:
        with suppress(OSError):
            _CLEAR.write_text("5")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    @property
    def resident_bytes(self) -> int:
        """Peak resident set of the process."""
        try:
            lines = _STATUS.read_text().splitlines()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    @property
    def device_bytes(self) -> int:
        """Peak of the tensors on the GPU; 0 without one."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
