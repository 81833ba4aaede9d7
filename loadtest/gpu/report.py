"""The tables of a run on a GPU, and the same as JSON."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fusionserve.loadtest.bench.floor import MachineLimit, floor
from fusionserve.loadtest.gpu.figures import (
    ChurnFigure,
    DeviceFigure,
    Failure,
    Figure,
    KernelFigure,
    Sample,
)
from fusionserve.loadtest.gpu.workload import GpuWorkload

Line = tuple[str, str, str, str]  # what, how much, of what, aim

_PEER_AIMS = {"transformers": "4", "PEFT": "15"}  # how much faster ours should be


def _no_samples() -> defaultdict[str, dict[str, list[float]]]:
    return defaultdict(dict)


@dataclass(slots=True)
class GpuFigures:
    """All that was measured: samples are seconds by what they are of and by case, every repeat."""

    workload: GpuWorkload
    versions: dict[str, str]
    device: DeviceFigure | None = None
    samples: defaultdict[str, dict[str, list[float]]] = field(default_factory=_no_samples)
    churn: dict[str, ChurnFigure] = field(default_factory=dict)
    kernels: list[KernelFigure] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """One more."""
        match figure:
            case DeviceFigure():
                self.device = figure
            case Sample():
                self.samples[figure.what].setdefault(figure.case, []).append(figure.seconds)
            case ChurnFigure():
                self.churn[figure.round] = figure
            case KernelFigure():
                self.kernels.append(figure)
            case Failure():
                self.failures.append(figure)

    def to_json(self) -> dict[str, Any]:
        """Every repeat, and the lines of the table."""
        return {
            "device": asdict(self.device) if self.device else None,
            "versions": self.versions,
            **self.samples,
            "churn": {name: asdict(figure) for name, figure in self.churn.items()},
            "kernels": [asdict(figure) for figure in self.kernels],
            "failures": [asdict(failure) for failure in self.failures],
            "lines": self.lines(),
        }

    def lines(self) -> list[Line]:
        """A line per figure, what could not be measured first."""
        failures = [
            ("failed: " + " / ".join(filter(None, (f.part, f.case))), "", f.error, "") for f in self.failures
        ]
        return [
            *failures,
            *(self._floor_lines(self.device) if self.device else ()),
            *self._case_lines(),
            *self._few_bits_lines(),
            *self._peer_lines(),
            *self._churn_lines(),
            *(_kernel_line(kernel, self.device) for kernel in self.kernels if self.device),
        ]

    def _floor_lines(self, device: DeviceFigure) -> Iterator[Line]:
        """The base beside what the device can do at best."""
        workload, limit = self.workload, _limit(device)
        for what, case, load, aim in (
            ("base, decoding step", "base", workload.load(), "0.75"),
            ("base, decoding step of one stream", "base, one stream", workload.load(1), ""),
        ):
            if own_s := self._median("step_s", case):
                least_s = floor(workload.size, load, limit).decode_s / (workload.new_tokens - 1)
                yield what, _ms(own_s), f"{least_s / own_s:.2f} of the floor", aim
        if own_s := self._median("long_prompt_s", "base"):
            load = replace(workload.load(1), prompt_tokens=workload.long_prompt, new_tokens=1)
            share = f"{floor(workload.size, load, limit).prompt_s / own_s:.2f} of the rate"
            yield self._prompt, _ms(own_s), share, "0.5"

    def _case_lines(self) -> Iterator[Line]:
        base_s = self._median("step_s", "base")
        for case in self.workload.cases():
            if own_s := self._median("step_s", case.name):
                share = f"{base_s / own_s:.2f} of base" if base_s else ""
                yield case.name, _ms(own_s), share, "" if case.aim is None else f"{case.aim}"

    def _few_bits_lines(self) -> Iterator[Line]:
        """Beside bfloat16."""
        for bits in ("int8", "int4"):
            name = f"base in {bits}"
            for text, what, case in (
                ("decoding step", "step_s", ""),
                ("decoding step of one stream", "step_s", ", one stream"),
                (self._prompt, "long_prompt_s", ""),
            ):
                if own_s := self._median(what, name + case):
                    full_s = self._median(what, "base" + case)
                    ratio = f"{full_s / own_s:.2f} x as fast" if full_s else ""
                    yield f"{name}, {text}", _ms(own_s), ratio, ""

    def _peer_lines(self) -> Iterator[Line]:
        for peer, case in self.workload.peer_cases().items():
            if peer_s := self._median("peers_round_s", peer):
                own_s = self._median("round_s", case.name)
                ratio = f"we, {case.name}: {peer_s / own_s:.1f} x as fast" if own_s else ""
                yield f"{peer}, a round", _ms(peer_s), ratio, _PEER_AIMS[peer]

    def _churn_lines(self) -> Iterator[Line]:
        calm, churning = self.churn.get("calm"), self.churn.get("churning")
        if calm is None or churning is None:
            return
        share = f"{churning.tokens_per_s / calm.tokens_per_s:.2f} of those in the pool"
        yield "all adapters, by Zipf's law", f"{churning.tokens_per_s:.0f} tokens/s", share, "0.75"
        for what, one_s, other_s, aim in (
            ("p99 gap of warm streams", churning.warm_itl_s, calm.warm_itl_s, "1.3"),
            ("p99 time to first token, cold", churning.cold_ttft_s, churning.warm_ttft_s, "2"),
        ):
            if one_s is not None and other_s is not None:
                yield what, _ms(one_s), f"{one_s / other_s:.2f} x {_ms(other_s)}", aim

    @property
    def _prompt(self) -> str:
        return f"prompt of {self.workload.long_prompt} tokens"

    def _median(self, what: str, case: str) -> float | None:
        found: Sequence[float] = self.samples.get(what, {}).get(case, ())
        return statistics.median(found) if found else None


def _kernel_line(kernel: KernelFigure, device: DeviceFigure) -> Line:
    floor_s = max(kernel.num_bytes / device.bytes_per_s, kernel.flops / device.flops_per_s)
    share = f"{floor_s / kernel.ours_s:.2f} of the floor"
    if kernel.library_s is None:
        return kernel.name, _ms(kernel.ours_s), f"{share}; no {kernel.library} here", ""
    ratio = f"{kernel.library} takes {kernel.library_s / kernel.ours_s:.2f} x as long"
    return kernel.name, _ms(kernel.ours_s), f"{share}; {ratio}", ""


def _limit(device: DeviceFigure) -> MachineLimit:
    return MachineLimit(bytes_per_s=device.bytes_per_s, flops_per_s=device.flops_per_s)


def to_table(figures: GpuFigures) -> str:
    """In Markdown."""
    workload = figures.workload
    rows = ["| what | median | | aim |", "| --- | ---: | ---: | ---: |"]
    rows += [f"| {' | '.join(line)} |" for line in figures.lines()]
    return "\n".join(
        (
            f"{_speed(figures.device)}; {', '.join(f'{name} {number}' for name, number in figures.versions.items())}",
            f"{workload.shape}, bfloat16, {workload.num_streams} streams, {workload.prompt_tokens} in, "
            f"{workload.new_tokens} out",
            "",
            *rows,
        )
    )


def _speed(device: DeviceFigure | None) -> str:
    if device is None:
        return "no device"
    gigabytes, tera = device.bytes_per_s / 1e9, device.flops_per_s / 1e12
    return f"{device.name}: copies {gigabytes:.0f} GB/s, multiplies {tera:.1f} TFLOP/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
