"""The parts of a run. Each has a process of its own, because an error of the GPU spoils all that follows in one."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from fusionserve.engine.device import find_device
from fusionserve.loadtest.gpu.churn import ChurnWorkload, measure_churn
from fusionserve.loadtest.gpu.device_limit import measure_device_limit
from fusionserve.loadtest.gpu.engine_rounds import EngineRounds, Round
from fusionserve.loadtest.gpu.figures import DeviceFigure, Sample
from fusionserve.loadtest.gpu.findings import Findings
from fusionserve.loadtest.gpu.peer_rounds import PeerRounds
from fusionserve.loadtest.gpu.workload import Case, GpuWorkload

_BASE = Case(name="base")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all parts are told; the workload's files are in `folder` once the part "files" is done."""

    workload: GpuWorkload
    churn: ChurnWorkload
    repeats: int
    device: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Part:
    """What measures it, and the seconds it may take, three times what is expected: one that hangs ends there."""

    measure: Callable[[Job, Findings, torch.device], None]
    most_s: float
    needs_gpu: bool = False
    needs_files: bool = False


def measure_part(name: str, job: Job, answers: TextIO) -> None:
    """Writes the part's figures to `answers` as they come; what it raises is among them."""
    findings = Findings(name, answers)
    with findings.guarded():
        PARTS[name].measure(job, findings, find_device(job.device))


def _measure_device(job: Job, findings: Findings, device: torch.device) -> None:
    limit = measure_device_limit(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    findings.tell(
        DeviceFigure(
            type=device.type, name=name, bytes_per_s=limit.bytes_per_s, flops_per_s=limit.flops_per_s
        )
    )


def _make_files(job: Job, findings: Findings, device: torch.device) -> None:
    job.workload.make_files(job.folder)


def _measure_kernels(job: Job, findings: Findings, device: torch.device, *, kind: str) -> None:
    """Imports Triton, which trying the benchmark out on a CPU does without."""
    from fusionserve.loadtest.gpu.kernel_cases import KernelSizes, kernel_cases
    from fusionserve.loadtest.gpu.kernel_times import measure_kernels

    measure_kernels(kernel_cases(KernelSizes(), device)[kind], findings, device)


def _measure_engine(job: Job, findings: Findings, device: torch.device) -> None:
    rounds = EngineRounds(job.workload, job.folder, device)
    with findings.guarded("base"):
        _measure_base(rounds, "base", job, findings)
    for case in job.workload.cases():
        with findings.guarded(case.name):
            for repeat in range(-1, job.repeats):  # the first warms up
                found = rounds.run(case, f"{case.name} {repeat}")
                if repeat >= 0:
                    _tell(findings, case.name, found)
    rounds.close()


def _measure_few_bits(job: Job, findings: Findings, device: torch.device, *, quantize: str) -> None:
    rounds = EngineRounds(job.workload, job.folder, device, quantize)
    _measure_base(rounds, f"base in {quantize}", job, findings)
    rounds.close()


def _measure_base(rounds: EngineRounds, name: str, job: Job, findings: Findings) -> None:
    """Decoding with all streams and with one, and reading a long prompt."""
    for repeat in range(-1, job.repeats):  # as above
        all_streams = rounds.run(_BASE, f"base {repeat}")
        one_stream = rounds.run_alone(f"alone {repeat}")
        prompt_s = rounds.read_prompt(f"long {repeat}")
        if repeat >= 0:
            _tell(findings, name, all_streams)
            _tell(findings, f"{name}, one stream", one_stream)
            findings.tell(Sample(what="long_prompt_s", case=name, seconds=prompt_s))


def _tell(findings: Findings, case: str, found: Round) -> None:
    findings.tell(Sample(what="round_s", case=case, seconds=found.round_s))
    findings.tell(Sample(what="step_s", case=case, seconds=found.step_s))


def _measure_churn(job: Job, findings: Findings, device: torch.device) -> None:
    measure_churn(job.churn, job.folder / "churn", device, findings.tell)


def _measure_peers(job: Job, findings: Findings, device: torch.device) -> None:
    """A round each on the same work as a case of ours, after a few tokens that warm up."""
    workload = job.workload
    rounds = PeerRounds(workload.shape, device)
    for peer, case in workload.peer_cases().items():
        with findings.guarded(peer):
            if case.adapters:
                rounds.put_adapters_on([job.folder / "adapters" / name for name in case.adapters])
            rounds.run(workload.prompts("warm-up"), 4)
            seconds = rounds.run(workload.prompts(peer), workload.new_tokens)
            findings.tell(Sample(what="peers_round_s", case=peer, seconds=seconds))


_KERNELS = {kind: partial(_measure_kernels, kind=kind) for kind in ("attention", "adapters", "products")}

# In the order in which they are run, peers last.
PARTS = {
    "device": Part(_measure_device, 60),
    "files": Part(_make_files, 120),
    **{kind: Part(measure, 90, needs_gpu=True) for kind, measure in _KERNELS.items()},
    "engine": Part(_measure_engine, 270, needs_files=True),
    "int8": Part(partial(_measure_few_bits, quantize="int8"), 100),
    "int4": Part(partial(_measure_few_bits, quantize="int4"), 100),
    "churn": Part(_measure_churn, 150),
    "peers": Part(_measure_peers, 180, needs_files=True),
}
