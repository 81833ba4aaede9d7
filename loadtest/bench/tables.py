"""Prints what a benchmark found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fusionserve.loadtest.bench.figures import (
    RATIOS,
    Figures,
    Key,
    Outcomes,
    Ratio,
    Spread,
    ratio,
    tokens_per_s,
)
from fusionserve.loadtest.bench.floor import Floor, MachineLimit
from fusionserve.loadtest.bench.workloads import BenchWorkload

_HEADER = (
    f"{'system':17} {'kind':7} {'tokens/s':>9} {'least-greatest':>15} {'ours is':>8} {'prompt s':>9} "
    f"{'decode s':>9} {'of floor':>9} {'decode':>7} {'same 1st':>9}"
)


def machine_line(limits: Sequence[MachineLimit], num_threads: int) -> str:
    """What the machine was measured to do, over the repeats."""
    bandwidth = Spread.of([each.bytes_per_s / 1e9 for each in limits])
    rate = Spread.of([each.flops_per_s / 1e9 for each in limits])
    return (
        f"machine, {num_threads} threads: reads {bandwidth.median:.1f} GB/s "
        f"({bandwidth.least:.1f}-{bandwidth.greatest:.1f}), multiplies {rate.median:.0f} GFLOP/s in bfloat16 "
        f"({rate.least:.0f}-{rate.greatest:.0f})"
    )


def floor_lines(workload: BenchWorkload, floors: Mapping[str, Floor]) -> list[str]:
    """The least seconds of each kind, and the rate they imply."""
    return [
        f"{'floor':17} {kind:7} {workload.num_generated / least.total_s:9.1f} {'':15} {'':8} "
        f"{least.prompt_s:9.2f} {least.decode_s:9.2f}"
        for kind, least in floors.items()
    ]


def figure_lines(lines: Mapping[Key, Figures]) -> list[str]:
    """One line per system and kind, under a header."""
    return [_HEADER, *(_figure_line(key, each) for key, each in lines.items())]


def ratio_lines(outcomes: Outcomes, workload: str) -> list[str]:
    """The ratios that the project holds itself to, as far as both sides ran."""
    found = ((each, ratio(each.over, each.under, outcomes)) for each in RATIOS)
    return [
        _ratio_line(each, spread, each.bars.get(workload)) for each, spread in found if spread is not None
    ]


def repeat_lines(outcomes: Outcomes) -> list[str]:
    """Tokens/s of every single repeat."""
    return [
        f"{system:17} {kind:7} {', '.join(f'{tokens_per_s(each):.1f}' for each in measured)}"
        for (system, kind), measured in outcomes.items()
    ]


def _figure_line(key: Key, line: Figures) -> str:
    system, kind = key
    rate = line.tokens_per_s
    return (
        f"{system:17} {kind:7} {rate.median:9.1f} {f'{rate.least:.1f}-{rate.greatest:.1f}':>15} "
        f"{f'{line.ours_times.median:.2f} x' if line.ours_times else '-':>8} {_two_digits(line.prompt_s):>9} "
        f"{_two_digits(line.decode_s):>9} {_two_digits(line.floor_share):>9} "
        f"{_two_digits(line.decode_floor_share):>7} {_two_digits(line.first_tokens_equal):>9}"
    )


def _ratio_line(each: Ratio, spread: Spread, bar: float | None) -> str:
    verdict = "" if bar is None else f"   bar {bar:.2f}: {'met' if spread.median >= bar else 'MISSED'}"
    return f"{each.label:42} {spread.median:6.2f}   ({spread.least:.2f}-{spread.greatest:.2f}){verdict}"


def _two_digits(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"
