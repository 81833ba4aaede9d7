"""Seconds of single kernels, beside the library's and beside what the device can do at best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fusionserve.loadtest.bench.floor import MachineLimit
from fusionserve.loadtest.gpu.device_limit import best_s
from fusionserve.loadtest.gpu.kernel_cases import KernelCase, KernelSizes, Work, kernel_cases
from fusionserve.loadtest.gpu.report import KernelFigure


@torch.inference_mode()
def measure_kernels(sizes: KernelSizes, limit: MachineLimit, device: torch.device) -> list[KernelFigure]:
    """A figure per case; takes a few seconds on a GPU, and as long again to compile kernels."""
    return [_measure(make(), limit, device) for make in kernel_cases(sizes, device)]


def _measure(case: KernelCase, limit: MachineLimit, device: torch.device) -> KernelFigure:
    return KernelFigure(
        name=case.name,
        library=case.library,
        ours_s=_seconds(case.ours, device),
        library_s=_seconds_or_none(case.theirs, device),
        floor_s=max(case.num_bytes / limit.bytes_per_s, case.flops / limit.flops_per_s),
    )


def _seconds_or_none(works: Sequence[Work], device: torch.device) -> float | None:
    """None where this torch does not have it, or not for this device."""
    try:
        return _seconds(works, device)
    except (AttributeError, NotImplementedError, RuntimeError):
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
