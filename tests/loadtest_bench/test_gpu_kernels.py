"""The comparison of single kernels: ours and the library's do the same work, and the figures are what was measured."""

from __future__ import annotations

import io

import pytest
import torch
from device_kernels import DEVICE

from fusionserve.loadtest.gpu import device_limit, kernel_times
from fusionserve.loadtest.gpu.figures import DeviceFigure, Failure, KernelFigure, from_line
from fusionserve.loadtest.gpu.findings import Findings
from fusionserve.loadtest.gpu.kernel_cases import KernelCase, KernelSizes, kernel_cases
from fusionserve.loadtest.gpu.kernel_times import measure_kernels
from fusionserve.loadtest.gpu.report import GpuFigures
from fusionserve.loadtest.gpu.workload import GpuWorkload

pytestmark = pytest.mark.gpu

SMALL = KernelSizes(
    num_heads=4,
    num_kv_heads=2,
    dim=16,
    hidden=64,
    inner=32,
    num_streams=4,
    context=32,
    num_prompts=2,
    prompt_tokens=48,
    num_adapters=4,
    rank=8,
    copies=2,
)


def cases() -> dict[str, KernelCase]:
    kinds = kernel_cases(SMALL, DEVICE).values()
    return {name: make() for kind in kinds for name, make in kind.items()}


@torch.inference_mode()
def test_ours_and_the_librarys_are_the_same_work() -> None:
    torch.manual_seed(0)
    made = cases()
    assert len(made) == 12
    for name, case in made.items():
        assert len(case.ours) == len(case.theirs) == SMALL.copies
        results = []
        for ours, theirs in zip(case.ours, case.theirs, strict=True):
            found, expected = ours().float().cpu(), theirs().float().cpu()
            assert float((found - expected).norm() / expected.norm()) < 0.15, name  # int4 against bfloat16
            results.append(found)
        assert not torch.equal(*results), "copies have the same data"


def test_least_work_is_counted() -> None:
    made = cases()
    decoding = made["attention, decoding: 4 x 32"]
    assert decoding.num_bytes == 2 * (2 * 4 * 32 * 2 * 16 + 2 * 4 * 4 * 16)
    assert decoding.flops == 2 * 2 * 4 * 4 * 16 * 32
    prompt = made["attention, prompt: 2 x 48"]
    assert prompt.flops == 2 * 2 * 2 * 4 * 16 * (48 * 49 // 2)
    adapters = made["4 adapters, r=8: 4 tokens"]
    assert adapters.num_bytes == 2 * (4 * 8 * (64 + 64) + 3 * 4 * 64)
    assert adapters.flops == 2 * 4 * 8 * (64 + 64)
    product = made["int4, gate and up: 16 tokens"]
    assert product.num_bytes == 64 * 64 * 4.5 / 8 and product.flops == 2 * 16 * 64 * 64


def test_figures_are_of_one_and_what_is_missing_or_fails_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.ones(4)

    def missing() -> torch.Tensor:
        raise RuntimeError("not for this device")

    case = {"library": "other", "num_bytes": 100, "flops": 30}
    makes = {
        "sum": lambda: KernelCase(**case, ours=[x.sum, x.sum], theirs=[x.sum]),
        "ours fails": lambda: KernelCase(**case, ours=[missing], theirs=[x.sum]),
        "alone": lambda: KernelCase(**case, ours=[x.sum, x.sum], theirs=[missing]),
    }
    monkeypatch.setattr(kernel_times, "_seconds", lambda works, _: [w() for w in works] and 0.1 * len(works))
    answers = io.StringIO()
    measure_kernels(makes, Findings("sums", answers), torch.device("cpu"))
    found = [from_line(line) for line in answers.getvalue().splitlines()]
    assert found == [
        KernelFigure(name="sum", ours_s=0.2, library_s=0.1, **case),
        Failure(part="sums", case="ours fails", error="RuntimeError: not for this device"),
        KernelFigure(name="alone", ours_s=0.2, library_s=None, **case),
    ]
    assert capsys.readouterr().err.count("RuntimeError: not for this device") == 2
    figures = GpuFigures(GpuWorkload(shape="tiny"), {})
    figures.add(DeviceFigure(type="cuda", name="a GPU", bytes_per_s=1e3, flops_per_s=1e2))
    for figure in found:
        figures.add(figure)
    assert [line[2] for line in figures.lines()] == [
        "RuntimeError: not for this device",
        "1.50 of the floor; other takes 0.50 x as long",
        "1.50 of the floor; no other here",
    ]


def test_seconds_are_of_one_of_all_in_a_row() -> None:
    calls: list[int] = []

    def work(number: int) -> torch.Tensor:
        calls.append(number)
        torch.rand(1 << 18)
        return torch.empty(0)

    found = kernel_times._seconds([lambda: work(1), lambda: work(2)], torch.device("cpu"))
    assert calls == [1, 2] * (device_limit._TRIES + 1)
    assert found > 0
