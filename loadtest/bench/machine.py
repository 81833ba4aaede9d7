"""Measures what the machine can do at best: bytes read per second and bfloat16 multiplications per second.

Reading: the sum of a float32 tensor of 512 MiB, far more than any cache holds, by torch on all threads. A sum does
nothing but read; matrix-vector products of torch read at half that speed and would flatter everyone. Multiplying:
`torch.mm` of two bfloat16 matrices of 2048 x 2048, which oneDNN runs from its caches. The best of a few tries counts,
because a limit is what can be reached. A virtual machine's limit is no constant: reading came out at 48 GB/s for some
minutes and at 78 for others, hence a measurement per repeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fusionserve.loadtest.bench.floor import MachineLimit

_READ_NUMBERS = 1 << 27  # float32: 512 MiB
_MATRIX_ROWS = 2048
_TRIES = 5


def measure_limit(num_threads: int) -> MachineLimit:
    """Both figures, with `num_threads` threads; takes about a second."""
    torch.set_num_threads(num_threads)
    numbers = torch.ones(_READ_NUMBERS)
    left, right = (torch.randn(_MATRIX_ROWS, _MATRIX_ROWS).bfloat16() for _ in range(2))
    return MachineLimit(
        bytes_per_s=numbers.nbytes / _best_s(numbers.sum),
        flops_per_s=2 * _MATRIX_ROWS**3 / _best_s(lambda: torch.mm(left, right)),
    )


def _best_s(work: Callable[[], object]) -> float:
    """The shortest of a few runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(_TRIES):
        started_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)
