"""The cores that this process has."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that it may run on, which in a container or under taskset are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
