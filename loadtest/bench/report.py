"""Everything a benchmark of one workload found, for people and for programs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fusionserve.loadtest.bench.figures import RATIOS, Figures, Key, Outcomes, figures, ratio
from fusionserve.loadtest.bench.floor import Floor, MachineLimit, floor
from fusionserve.loadtest.bench.protocol import KINDS
from fusionserve.loadtest.bench.systems import SYSTEMS
from fusionserve.loadtest.bench.tables import (
    figure_lines,
    floor_lines,
    machine_line,
    ratio_lines,
    repeat_lines,
)
from fusionserve.loadtest.bench.workloads import BenchWorkload


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadReport:
    """Outcomes and what is needed to read them."""

    workload: BenchWorkload
    num_threads: int
    limits: Sequence[MachineLimit]  # one per repeat
    outcomes: Outcomes
    failures: Mapping[str, str]
    versions: Mapping[str, Mapping[str, str]]

    @property
    def limit(self) -> MachineLimit:
        """The medians of what the machine did while the systems were measured."""
        return MachineLimit(
            statistics.median(each.bytes_per_s for each in self.limits),
            statistics.median(each.flops_per_s for each in self.limits),
        )

    def floor(self, kind: str, limit: MachineLimit) -> Floor:
        """The least seconds of a kind of round."""
        return floor(self.workload.model_size(), self.workload.load(kind), limit)

    def floors(self) -> dict[str, Floor]:
        """The least seconds of each kind with the median limit."""
        return {kind: self.floor(kind, self.limit) for kind in KINDS}

    def lines(self) -> dict[Key, Figures]:
        """Figures by (system, kind), kind by kind."""
        keys = sorted(self.outcomes, key=lambda key: (KINDS.index(key[1]), list(SYSTEMS).index(key[0])))
        return {key: figures(key, self.outcomes, self._floors_of_repeats(key)) for key in keys}

    def _floors_of_repeats(self, key: Key) -> list[Floor]:
        """A machine shared with others changes its pace between repeats. The arithmetic is for bfloat16 alone."""
        system, kind = key
        return [self.floor(kind, limit) for limit in self.limits] if SYSTEMS[system].is_bfloat16 else []


def to_text(report: WorkloadReport) -> str:
    """The tables."""
    lines = [report.workload.title, machine_line(report.limits, report.num_threads), ""]
    lines += figure_lines(report.lines())
    lines += [*floor_lines(report.workload, report.floors()), ""]
    lines += [*ratio_lines(report.outcomes, report.workload.name), ""]
    lines += [", ".join(_versions(report)), ""]
    lines += ["tokens/s of each repeat", *repeat_lines(report.outcomes), ""]
    lines += [f"left out: {name}: {reason}" for name, reason in report.failures.items()]
    return "\n".join(lines)


def _versions(report: WorkloadReport) -> list[str]:
    """What the systems said of themselves, each package once for each version."""
    told = (item for versions in report.versions.values() for item in versions.items())
    return list({f"{package} {number}": None for package, number in told})


def to_json(report: WorkloadReport) -> dict[str, Any]:
    """The same, and every round's seconds."""
    found = ((each, ratio(each.over, each.under, report.outcomes)) for each in RATIOS)
    return {
        "workload": asdict(report.workload),
        "num_threads": report.num_threads,
        "machine": [asdict(each) for each in report.limits],
        "floor": {kind: asdict(each) for kind, each in report.floors().items()},
        "systems": [
            {
                "system": system,
                "kind": kind,
                "versions": report.versions[system],
                **asdict(line),
                "rounds": [
                    {"prompt_s": each.prompt_s, "total_s": each.total_s}
                    for each in report.outcomes[system, kind]
                ],
            }
            for (system, kind), line in report.lines().items()
        ],
        "ratios": [
            {"label": each.label, "bar": each.bars.get(report.workload.name), **asdict(spread)}
            for each, spread in found
            if spread
        ],
        "failures": dict(report.failures),
    }
