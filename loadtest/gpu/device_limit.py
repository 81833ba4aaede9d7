"""Measures what a GPU can do at best: bytes moved and bfloat16 multiplications per second.

Moving: a copy within its memory, which reads and writes each byte. Multiplying: `torch.mm` of two square matrices. The
best of a few tries counts. On a CPU, where this is for trying the benchmark out, both are small.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fusionserve.loadtest.bench.floor import MachineLimit

_TRIES = 10


def measure_device_limit(device: torch.device) -> MachineLimit:
    """Both figures; takes a second."""
    num_bytes, num_rows = (4 << 30, 8192) if device.type == "cuda" else (64 << 20, 256)
    source = torch.randint(256, (num_bytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(num_rows, num_rows, device=device).bfloat16() for _ in range(2))
    return MachineLimit(
        bytes_per_s=2 * num_bytes / best_s(device, lambda: target.copy_(source)),
        flops_per_s=2 * num_rows**3 / best_s(device, lambda: torch.mm(left, right)),
    )


def wait_for(device: torch.device) -> None:
    """Returns once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_s(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of a few runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(_TRIES):
        wait_for(device)
        started_s = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)
