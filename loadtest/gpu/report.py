"""The tables of a run on a GPU, and the same as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fusionserve.loadtest.bench.floor import MachineLimit, floor
from fusionserve.loadtest.gpu.churn import ChurnRound
from fusionserve.loadtest.gpu.engine_rounds import Round
from fusionserve.loadtest.gpu.workload import Case, GpuWorkload

Line = tuple[str, str, str, str]  # what, how much, of what, aim


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRound:
    """What the base took: decoding with all streams and with one, and reading a long prompt."""

    all_streams: Round
    one_stream: Round
    prompt_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFigure:
    """Seconds of one kernel: ours, a library's (None: it has none) and the least there can be."""

    name: str
    library: str
    ours_s: float
    library_s: float | None
    floor_s: float

    @property
    def line(self) -> Line:
        """Its line of the table."""
        share = f"{self.floor_s / self.ours_s:.2f} of the floor"
        if self.library_s is None:
            return (self.name, _ms(self.ours_s), f"{share}; no {self.library} here", "")
        ratio = f"{self.library} takes {self.library_s / self.ours_s:.2f} x as long"
        return (self.name, _ms(self.ours_s), f"{share}; {ratio}", "")


@dataclass(slots=True)
class GpuFigures:
    """All that was measured."""

    workload: GpuWorkload
    device: str
    versions: dict[str, str]
    limit: MachineLimit
    base: list[BaseRound] = field(default_factory=list)
    few_bits: dict[str, list[BaseRound]] = field(default_factory=dict)
    cases: dict[str, list[Round]] = field(default_factory=dict)
    peers_s: dict[str, list[float]] = field(default_factory=dict)
    churn: tuple[ChurnRound, ChurnRound] | None = None
    kernels: list[KernelFigure] = field(default_factory=list)

    def lines(self, cases: Sequence[Case]) -> list[Line]:
        """A line per figure; without the base's only those of single kernels."""
        if not self.base:
            return self._kernel_lines()
        lines = self._base_lines()
        base_s = step_s(_all_streams(self.base))
        for case in cases:
            if rounds := self.cases.get(case.name):
                share = f"{base_s / step_s(rounds):.2f} of base"
                lines.append(
                    (case.name, _ms(step_s(rounds)), share, "" if case.aim is None else f"{case.aim}")
                )
        return [
            *lines,
            *self._few_bits_lines(),
            *self._peer_lines(),
            *self._churn_lines(),
            *self._kernel_lines(),
        ]

    def _kernel_lines(self) -> list[Line]:
        return [figure.line for figure in self.kernels]

    def _base_lines(self) -> list[Line]:
        workload, lines = self.workload, []
        for what, rounds, load, aim in (
            ("base, decoding step", _all_streams(self.base), workload.load(), "0.75"),
            ("base, decoding step of one stream", _alone(self.base), workload.load(1), ""),
        ):
            least_s = floor(workload.size, load, self.limit).decode_s / (workload.new_tokens - 1)
            lines.append((what, _ms(step_s(rounds)), f"{least_s / step_s(rounds):.2f} of the floor", aim))
        prompt_s = _prompt_s(self.base)
        share = f"{self._prompt_floor_s() / prompt_s:.2f} of the rate"
        return [*lines, (self._prompt, _ms(prompt_s), share, "0.5")]

    def _few_bits_lines(self) -> list[Line]:
        """Beside bfloat16."""
        lines = []
        for bits, rounds in self.few_bits.items():
            for what, own_s, full_s in (
                ("decoding step", step_s(_all_streams(rounds)), step_s(_all_streams(self.base))),
                ("decoding step of one stream", step_s(_alone(rounds)), step_s(_alone(self.base))),
                (self._prompt, _prompt_s(rounds), _prompt_s(self.base)),
            ):
                lines.append((f"base in {bits}, {what}", _ms(own_s), f"{full_s / own_s:.2f} x as fast", ""))
        return lines

    @property
    def _prompt(self) -> str:
        return f"prompt of {self.workload.long_prompt} tokens"

    def to_json(self, cases: Sequence[Case]) -> dict[str, Any]:
        """Every repeat, and the lines of the table."""
        bases = {"base": self.base, **{f"base in {bits}": own for bits, own in self.few_bits.items()}}
        rounds = {
            **{name: _all_streams(own) for name, own in bases.items()},
            **{f"{name}, one stream": _alone(own) for name, own in bases.items()},
            **self.cases,
        }
        return {
            "device": self.device,
            "versions": self.versions,
            "bytes_per_s": self.limit.bytes_per_s,
            "flops_per_s": self.limit.flops_per_s,
            "step_s": {name: [each.step_s for each in all_of] for name, all_of in rounds.items()},
            "round_s": {name: [each.fresh.total_s for each in all_of] for name, all_of in rounds.items()},
            "long_prompt_s": {name: [each.prompt_s for each in own] for name, own in bases.items()},
            "peers_round_s": self.peers_s,
            "kernels": [asdict(figure) for figure in self.kernels],
            "lines": self.lines(cases),
        }

    def _prompt_floor_s(self) -> float:
        one = replace(self.workload.load(1), prompt_tokens=self.workload.long_prompt, new_tokens=1)
        return floor(self.workload.size, one, self.limit).prompt_s

    def _peer_lines(self) -> list[Line]:
        lines = []
        for peer, (ours, aim) in peers(self.workload).items():
            rounds = _all_streams(self.base) if ours == "base" else self.cases.get(ours, [])
            if rounds and (peer_s := self.peers_s.get(peer)):
                ratio = statistics.median(peer_s) / statistics.median(each.fresh.total_s for each in rounds)
                lines.append(
                    (f"{peer}, a round", _ms(statistics.median(peer_s)), f"we: {ratio:.1f} x as fast", aim)
                )
        return lines

    def _churn_lines(self) -> list[Line]:
        if self.churn is None:
            return []
        calm, churning = self.churn
        rate = f"{churning.tokens_per_s:.0f} tokens/s"
        share = f"{churning.tokens_per_s / calm.tokens_per_s:.2f} of those in the pool"
        lines = [("all adapters, by Zipf's law", rate, share, "0.75")]
        for what, one, other, aim in (
            ("p99 gap of warm streams", churning.warm_itl_s, calm.warm_itl_s, "1.3"),
            ("p99 time to first token, cold", churning.cold_ttft_s, churning.warm_ttft_s, "2"),
        ):
            if one is not None and other is not None:
                lines.append((what, _ms(one.p99), f"{one.p99 / other.p99:.2f} x {_ms(other.p99)}", aim))
        return lines


def peers(workload: GpuWorkload) -> dict[str, tuple[str, str]]:
    """With which case of ours a peer's round is compared, and how much faster ours should be."""
    return {"transformers": ("base", "4"), "PEFT": (workload.equal_ranks, "15")}


def _all_streams(rounds: Sequence[BaseRound]) -> list[Round]:
    return [each.all_streams for each in rounds]


def _alone(rounds: Sequence[BaseRound]) -> list[Round]:
    return [each.one_stream for each in rounds]


def _prompt_s(rounds: Sequence[BaseRound]) -> float:
    return statistics.median(each.prompt_s for each in rounds)


def step_s(rounds: Sequence[Round]) -> float:
    """The median decoding step."""
    return statistics.median(each.step_s for each in rounds)


def to_table(figures: GpuFigures, cases: Sequence[Case]) -> str:
    """In Markdown."""
    workload, limit = figures.workload, figures.limit
    rows = ["| what | median | | aim |", "| --- | ---: | ---: | ---: |"]
    rows += [f"| {' | '.join(line)} |" for line in figures.lines(cases)]
    return "\n".join(
        (
            f"{figures.device}: copies {limit.bytes_per_s / 1e9:.0f} GB/s, multiplies {limit.flops_per_s / 1e12:.1f} "
            f"TFLOP/s; {', '.join(f'{name} {number}' for name, number in figures.versions.items())}",
            f"{workload.shape}, bfloat16, {workload.num_streams} streams, {workload.prompt_tokens} in, "
            f"{workload.new_tokens} out",
            "",
            *rows,
        )
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms"
