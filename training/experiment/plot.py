"""The experiment's picture: distance to the best adapter, what the fusion attends to, and the size curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusionserve.training.experiment.lab import MIXED
from fusionserve.training.experiment.report import (
    MIXTURE,
    Curve,
    Runs,
    best_single,
    perplexities,
    size_spread,
)
from fusionserve.training.experiment.results import Result
from fusionserve.training.training_plot import COLOURS, INK, dress


def draw_experiment(
    path: Path, runs: Runs, compared: Sequence[str], weighed: str, domains: Sequence[str], curve: Curve
) -> None:
    """Writes a PNG; `compared` are the systems of the first panel, `weighed` the fusion of the second."""
    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=[1.1, 1])
    _draw_distances(figure.add_subplot(grid[0, :]), runs, compared, domains)
    _draw_weights(figure.add_subplot(grid[1, 0]), runs[weighed], domains)
    _draw_curve(figure.add_subplot(grid[1, 1]), curve)
    figure.savefig(path)


def _draw_distances(axes: Axes, runs: Runs, compared: Sequence[str], domains: Sequence[str]) -> None:
    texts = [*domains, MIXTURE, *MIXED]
    best = best_single(runs, domains)
    width = 0.8 / len(compared)
    for i, system in enumerate(compared):
        found = [perplexities(result, domains) for result in runs[system]]
        ratios = [mean(perplexity[text] for perplexity in found) / best[text] for text in texts]
        places = [place + (i - (len(compared) - 1) / 2) * width for place in range(len(texts))]
        axes.bar(places, ratios, width * 0.9, color=COLOURS[i], label=system)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set_yscale("log")
    axes.set_xticks(range(len(texts)), [text.replace("_", " with ") for text in texts])
    ticks = (0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_title(
        "held-out perplexity by that of the best single adapter", loc="left", color=INK, fontsize=11
    )
    axes.legend(frameon=False, labelcolor=INK, ncols=len(compared), fontsize=9, loc="upper right")
    dress(axes)


def _draw_weights(axes: Axes, results: Sequence[Result], domains: Sequence[str]) -> None:
    texts = [*domains, *MIXED]
    table = [
        [mean(result.weights[text][member] for result in results) for member in domains] for text in texts
    ]
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(texts)), [text.replace("_", " with ") for text in texts])
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    for y, weights in enumerate(table):
        for x, weight in enumerate(weights):
            axes.text(
                x,
                y,
                f"{weight:.2f}",
                ha="center",
                va="center",
                color="white" if weight > 0.55 else INK,
                fontsize=9,
            )
    axes.set_title("mean weight of the members by text", loc="left", color=INK, fontsize=11)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    for i, (way, by_size) in enumerate(curve.items()):
        spreads = {size: size_spread(results) for size, results in by_size.items()}
        axes.errorbar(
            list(spreads),
            [found.mean for found in spreads.values()],
            [found.deviation for found in spreads.values()],
            color=COLOURS[i],
            marker="o",
            linewidth=2,
            capsize=3,
            label=way,
        )
    axes.set_xscale("log")
    axes.set_xticks(list(next(iter(curve.values()))), [str(size) for size in next(iter(curve.values()))])
    axes.minorticks_off()
    axes.set_xlabel("examples of the new domain", color=INK)
    axes.set_title("perplexity of a new domain: Portuguese messages", loc="left", color=INK, fontsize=11)
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    dress(axes)
