"""Command that runs the experiment of docs/fusion.md: `make fusion-experiment`.

It writes report.md, results as JSON and experiment.png to --out. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from fusionserve.training.experiment.lab import Lab, open_lab
from fusionserve.training.experiment.plot import draw_experiment
from fusionserve.training.experiment.report import Curve, by_system, to_report
from fusionserve.training.experiment.results import Result, Results
from fusionserve.training.experiment.size_curve import NEW, OTHERS, OWN, SIZES, WITH_OWN, run_size_curve
from fusionserve.training.experiment.systems import (
    FUSION,
    GATE,
    SHIPPED,
    STATIC,
    UNIFORM,
    run_systems,
)
from fusionserve.training.quiet_libraries import keep_libraries_quiet

_COMPARED = (UNIFORM, STATIC, GATE, FUSION, SHIPPED)
_PLOT, _REPORT = "experiment.png", "report.md"


def main() -> None:
    """Run everything and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=Path, default=Path("examples/fusion_data"), help="the packed texts")
    parser.add_argument("--out", type=Path, default=Path("build/experiment"))
    parser.add_argument("--steps", type=int, default=120, help="of every system that trains")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    keep_libraries_quiet()
    _run(arguments.texts, arguments.out, arguments.steps, range(arguments.seeds))


def _run(texts: Path, out: Path, steps: int, seeds: Sequence[int]) -> None:
    lab = open_lab(texts, out / "scratch", steps)
    results = Results(out / "results", lab.identity)
    runs = by_system(_told(run_systems(lab, results, seeds)))
    alone, curve = _size_curve(lab, texts, results, seeds)
    report = to_report(runs, alone, curve, lab.domains)
    (out / _REPORT).write_text(report, encoding="utf-8")
    draw_experiment(out / _PLOT, runs, _COMPARED, SHIPPED, lab.domains, curve)
    print(report)


def _size_curve(
    lab: Lab, texts: Path, results: Results, seeds: Sequence[int]
) -> tuple[dict[str, float], Curve]:
    """(perplexity of what knows nothing of the new domain, curve of what has learned from it)."""
    alone: dict[str, float] = {}
    curve: dict[str, dict[int, list[Result]]] = {
        way: {size: [] for size in SIZES} for way in (OWN, WITH_OWN, OTHERS)
    }
    for size, result in run_size_curve(lab, texts, results, seeds):
        _tell(result, f"{size} examples" if size else "")
        if size:
            curve[result.system][size].append(result)
        else:
            alone[result.system] = math.exp(result.losses[NEW])
    return alone, curve


def _told(results: Iterable[Result]) -> Iterable[Result]:
    for result in results:
        _tell(result)
        yield result


def _tell(result: Result, what: str = "") -> None:
    numbers = "  ".join(f"{text} {math.exp(loss):.2f}" for text, loss in result.losses.items())
    print(f"{result.system} {what} seed {result.seed}, {result.seconds:.0f} s: {numbers}", flush=True)


if __name__ == "__main__":
    main()
