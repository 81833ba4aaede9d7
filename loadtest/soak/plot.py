"""The picture of a soak: what the server held over time, above who was there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.samples import (
    BLOCKS,
    FILES,
    FUSION_LEASES,
    HEAP,
    LAG,
    LEASES,
    ROWS,
    RSS,
    RUNNING,
    TASKS,
    THREADS,
    Samples,
)
from fusionserve.loadtest.soak.verdict import WARM_UP

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7")
_INK, _FAINT, _GRID = "#333333", "#777777", "#E6E6E6"
_PANELS = (
    ("memory (MiB)", (RSS, HEAP)),
    ("in the server's process", (FILES, THREADS, TASKS)),
    ("how late the event loop was (ms)", (LAG,)),
    ("held by requests", (BLOCKS, ROWS)),
    ("leases, running requests", (LEASES, FUSION_LEASES, RUNNING)),
)
_MOST_POINTS = 900  # more would be narrower than a pixel; each stands for the largest of its neighbours


def draw_soak(samples: Samples, record: SoakRecord, title: str, path: Path) -> Path:
    """Writes the PNG."""
    kinds = sorted({visit.kind for visit in record.visits})
    heights = [1.2] * len(_PANELS) + [0.6, 0.25 + 0.16 * len(kinds)]
    figure = Figure(figsize=(11, 1.2 * sum(heights)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels: list[Axes] = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK)
    minutes = np.array(samples.times_s) / 60
    for axes, (label, names) in zip(panels, _PANELS, strict=False):
        _draw_lines(axes, minutes, samples, names)
        _name(axes, label)
        axes.set_ylim(bottom=None if RSS in names else 0)
    _draw_commands(panels[-2], record, minutes[-1])
    _draw_visits(panels[-1], record, kinds)
    for axes in panels:
        axes.axvspan(0, minutes[-1] * WARM_UP, color="#F4F4F4", zorder=0)
        axes.set_xlim(0, minutes[-1])
        _dress(axes)
    panels[0].annotate("warm-up", (0.004, 0.06), xycoords="axes fraction", fontsize=8, color=_FAINT)
    panels[-1].set_xlabel("minutes", color=_INK)
    figure.savefig(path)
    return path


def _draw_lines(axes: Axes, minutes: np.ndarray, samples: Samples, names: Sequence[str]) -> None:
    width = -(-len(minutes) // _MOST_POINTS)
    starts = np.arange(0, len(minutes), width)
    for name, colour in zip(names, _COLOURS, strict=False):
        values = np.maximum.reduceat(np.array(samples.columns[name]), starts)
        axes.plot(minutes[starts], values, color=colour, linewidth=1.1, label=name)
    axes.legend(
        frameon=False, labelcolor=_INK, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.97), ncols=3
    )


def _draw_commands(axes: Axes, record: SoakRecord, minutes: float) -> None:
    """Loads and unloads a second."""
    counts, edges = np.histogram(np.array(record.command_times_s) / 60, bins=60, range=(0, minutes))
    axes.stairs(counts / np.diff(edges) / 60, edges, color=_COLOURS[4], fill=True, alpha=0.5)
    _name(axes, "loads and unloads a second")


def _draw_visits(axes: Axes, record: SoakRecord, kinds: Sequence[str]) -> None:
    for row, kind in enumerate(kinds):
        spans = [(v.since_s / 60, (v.until_s - v.since_s) / 60) for v in record.visits if v.kind == kind]
        axes.broken_barh(spans, (row - 0.35, 0.7), color=_COLOURS[3])
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    _name(axes, "hostile clients")


def _name(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=9, color=_INK)


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    axes.tick_params(colors=_INK, labelsize=8)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
