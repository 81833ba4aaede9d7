"""The picture of a training run: losses over the steps, and for a fusion the members' weights below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WEIGHT_PREFIX = "eval_weight_"

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#666666")
_TRAIN, _HELD_OUT, INK, _GRID = "#9DB7C9", "#D55E00", "#333333", "#E6E6E6"


def draw_training(
    path: Path, title: str, history: Sequence[Mapping[str, float]], best_step: int | None
) -> None:
    """Writes a PNG of `history`, the Trainer's log."""
    weights = [entry for entry in history if any(name.startswith(WEIGHT_PREFIX) for name in entry)]
    figure = Figure(figsize=(8, 6.4 if weights else 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        2 if weights else 1, sharex=True, squeeze=False, height_ratios=[3, 2][: 1 + bool(weights)]
    )[:, 0]
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, color=INK, parse_math=False)
    _draw_losses(axes[0], history, best_step)
    if weights:
        _draw_weights(axes[1], weights)
    for panel in axes:
        dress(panel)
    axes[-1].set_xlabel("step", color=INK)
    figure.savefig(path)


def _draw_losses(axes: Axes, history: Sequence[Mapping[str, float]], best_step: int | None) -> None:
    steps, losses = _series(history, "loss")
    axes.plot(steps, losses, color=_TRAIN, linewidth=1.2, label="training")
    steps, losses = _series(history, "eval_loss")
    if steps:
        axes.plot(steps, losses, color=_HELD_OUT, linewidth=2, marker="o", markersize=4, label="held out")
    if best_step is not None and best_step in steps:
        best = losses[steps.index(best_step)]
        axes.plot(
            [best_step],
            [best],
            marker="o",
            markersize=10,
            color=_HELD_OUT,
            fillstyle="none",
            linestyle="none",
        )
        axes.annotate(
            f"best {best:.3f}",
            (best_step, best),
            (0, 14),
            textcoords="offset points",
            ha="right" if best_step > max(steps) / 2 else "left",
            color=_HELD_OUT,
        )
    axes.set_ylabel("loss (nats per token)", color=INK)
    axes.legend(frameon=False, labelcolor=INK)


def _draw_weights(axes: Axes, entries: Sequence[Mapping[str, float]]) -> None:
    """One line per member, named where it ends."""
    names = [name for name in entries[0] if name.startswith(WEIGHT_PREFIX)]
    for i, name in enumerate(names):
        steps, weights = _series(entries, name)
        axes.plot(
            steps,
            weights,
            color=COLOURS[i % len(COLOURS)],
            linewidth=2,
            label=name.removeprefix(WEIGHT_PREFIX),
        )
    axes.set_ylabel("mean weight, held out", color=INK)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=INK, ncols=min(6, len(names)), fontsize=9, loc="upper left")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # room for the names


def _series(entries: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    found = [(entry["step"], entry[name]) for entry in entries if name in entry]
    return [step for step, _ in found], [value for _, value in found]


def dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    axes.tick_params(colors=INK)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
