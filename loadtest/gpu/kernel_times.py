"""Seconds of single kernels, beside the library's."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

import torch

from fusionserve.loadtest.gpu.device_limit import best_s
from fusionserve.loadtest.gpu.figures import KernelFigure
from fusionserve.loadtest.gpu.findings import Findings
from fusionserve.loadtest.gpu.kernel_cases import KernelCase, Work


@torch.inference_mode()
def measure_kernels(
    cases: Mapping[str, Callable[[], KernelCase]], findings: Findings, device: torch.device
) -> None:
    """Tells a figure per case, or why there is none; takes seconds on a GPU, and as long again to compile kernels."""
    for name, make in cases.items():
        with findings.guarded(name):
            findings.tell(_measure(name, make(), device))


def _measure(name: str, case: KernelCase, device: torch.device) -> KernelFigure:
    return KernelFigure(
        name=name,
        library=case.library,
        ours_s=_seconds(case.ours, device),
        library_s=_seconds_or_none(case.theirs, device),
        num_bytes=case.num_bytes,
        flops=case.flops,
    )


def _seconds_or_none(works: Sequence[Work], device: torch.device) -> float | None:
    """None where this torch does not have it, or not for this device; standard error says what it said."""
    try:
        return _seconds(works, device)
    except (AttributeError, NotImplementedError, RuntimeError):
        traceback.print_exc(limit=1, file=sys.stderr)
        return None


def _seconds(works: Sequence[Work], device: torch.device) -> float:
    """Of one: the best of some tries with all of them in a row, without what launching them from Python takes."""
    return best_s(device, _recorded(works, device)) / len(works)


def _recorded(works: Sequence[Work], device: torch.device) -> Callable[[], object]:
    def all_of_them() -> None:
        for work in works:
            work()

    if device.type != "cuda":
        return all_of_them
    all_of_them()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        all_of_them()
    return graph.replay
