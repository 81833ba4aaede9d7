"""The pictures of a load test: latencies, the run over time, and the adapters side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from fusionserve.loadtest.load_report import Json
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest_config import BASE, BLEND, FUSION, KINDS, LORA

MAX_BARS = 24  # adapters with bars of their own

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = {BASE: "#666666", LORA: "#0072B2", BLEND: "#E69F00", FUSION: "#009E73"}
_LABELS = {BASE: "base", LORA: "LoRA", BLEND: "blend", FUSION: "fusion"}
_MAIN, _LIGHT, _FAILED = "#0072B2", "#9CC7E4", "#D55E00"
_INK, _FAINT, _GRID = "#333333", "#777777", "#E6E6E6"
_DASHES = (0, (4, 3))


def draw_plots(outcome: Outcome, report: Json, out: Path) -> list[Path]:
    """Writes the PNGs there is something to show in, and returns their paths."""
    if not report["latency"]["ttft_s"]:
        return []
    drawn = [draw_latency(outcome, out / "latency.png"), draw_timeline(outcome, report, out / "timeline.png")]
    if len(report["by_adapter"]) > 1:
        drawn.append(draw_adapters(outcome, report, out / "adapters.png"))
    return drawn


def draw_latency(outcome: Outcome, path: Path) -> Path:
    """Which share of requests had their first token, and of gaps ended, within how many ms, by kind."""
    figure, (left, right) = _figure(outcome, (10, 4.8), (1, 2))
    groups = {
        kind: [record for record in outcome.counted if record.is_ok and record.kind == kind] for kind in KINDS
    }
    levels = outcome.config.service_levels
    _draw_cdf(left, groups, lambda record: [record.ttft_s] if record.ttft_s is not None else [])
    _finish_cdf(left, "time to first token (ms)", "share of requests", levels.ttft_s)
    _draw_cdf(right, groups, lambda record: record.itls_s)
    _finish_cdf(right, "inter-token latency (ms)", "share of gaps", levels.itl_s)
    figure.savefig(path)
    return path


def _draw_cdf(
    axes: Axes,
    groups: Mapping[str, Iterable[RequestRecord]],
    measure: Callable[[RequestRecord], list[float]],
) -> None:
    """One curve per kind; the axis leaves out the fastest half percent, which a log scale would stretch."""
    limits = []
    for kind, records in groups.items():
        values = np.sort([value * 1000 for record in records for value in measure(record)])
        if values.size:
            low, p99 = np.percentile(values, (0.5, 99))
            limits += [max(low, 0.1), values[-1]]
            shares = np.arange(1, values.size + 1) / values.size
            label = f"{_LABELS[kind]}, p99 {p99:,.0f} ms"
            axes.step(values, shares, where="post", color=_COLOURS[kind], linewidth=1.8, label=label)
    axes.set_xscale("log")
    axes.set_xlim(min(limits, default=1) / 1.15, max(limits, default=10) * 1.15)


def _finish_cdf(axes: Axes, x_label: str, y_label: str, limit_s: float | None) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(0, 1.02)
    for share, name in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        axes.axhline(share, color=_GRID, linewidth=0.8, zorder=0)
        _note_right(axes, name, share, _FAINT)
    if limit_s is not None:
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, limit_s * 900), max(high, limit_s * 1100))
        axes.axvline(limit_s * 1000, color=_FAILED, linewidth=1.2, linestyle=_DASHES, label="service level")
    axes.set_xlabel(x_label, color=_INK)
    axes.set_ylabel(y_label, color=_INK)
    _dress(axes, "x")
    axes.legend(
        frameon=False, labelcolor=_INK, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3
    )


def _note_right(axes: Axes, text: str, y: float, colour: str) -> None:
    """Names a height at the right edge."""
    axes.annotate(
        text,
        (1, y),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=colour,
        annotation_clip=False,
    )


def draw_timeline(outcome: Outcome, report: Json, path: Path) -> Path:
    """Tokens/s above, requests in flight below, and failures where there were any.

    The bins have all tokens that came; the dashed line is the report's figure, without the warm-up's and failed ones.
    """
    line = report["timeline"]
    figure, (above, below) = _figure(outcome, (10, 5.2), (2, 1), sharex=True)
    edges_s, tokens_per_s = line["edges_s"], line["generated_tokens_per_s"]
    throughput = report["throughput"]["generated_tokens_per_s"]
    _fill(above, tokens_per_s, edges_s, _MAIN, "generated tokens/s")
    above.axhline(throughput, color=_MAIN, linewidth=1, linestyle=_DASHES)
    _note_right(above, f"throughput {throughput:.1f}", throughput, _MAIN)
    above.set_ylabel("tokens/s", color=_INK)
    _fill(below, line["in_flight"], edges_s, _COLOURS[FUSION], "most requests in flight")
    if any(line["failed_per_s"]):
        _fill(below, line["failed_per_s"], edges_s, _FAILED, "failed requests/s")
    below.yaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_ylabel("requests", color=_INK)
    below.set_xlabel("seconds since the first counted request", color=_INK)
    for axes in (above, below):
        _dress(axes, "y")
        axes.set_ylim(bottom=0)
        axes.set_xlim(edges_s[0], edges_s[-1])
        axes.legend(
            frameon=False, labelcolor=_INK, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2
        )
    figure.savefig(path)
    return path


def _fill(axes: Axes, values: list[float], edges_s: list[float], colour: str, label: str) -> None:
    axes.stairs(values, edges_s, color=colour, fill=True, alpha=0.25)
    axes.stairs(values, edges_s, color=colour, linewidth=1.6, label=label)


def draw_adapters(outcome: Outcome, report: Json, path: Path) -> Path:
    """The adapters most asked for: requests, p50 and p99 of the first token, and the speed their streams see."""
    groups = list(report["by_adapter"].items())[:MAX_BARS]
    figure, panels = _figure(outcome, (10, 1.7 + 0.27 * len(groups)), (1, 3), sharey=True)
    rows = np.arange(len(groups))
    requests = [group["requests"] for _, group in groups]
    ttfts = [group["latency"]["ttft_s"] or {"p50": 0.0, "p99": 0.0} for _, group in groups]
    panels[0].barh(rows, requests, color=_MAIN, height=0.7)
    panels[1].barh(rows, [ttft["p99"] * 1000 for ttft in ttfts], color=_LIGHT, height=0.7, label="p99")
    panels[1].barh(rows, [ttft["p50"] * 1000 for ttft in ttfts], color=_MAIN, height=0.7, label="p50")
    panels[2].barh(rows, [group["stream_tokens_per_s"] for _, group in groups], color="#009E73", height=0.7)
    panels[0].set_yticks(rows, [name for name, _ in groups], parse_math=False)
    panels[0].set_ylim(len(groups) - 0.4, -0.6)  # the first on top
    titles = ("requests", "time to first token (ms)", "tokens/s that a stream sees")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_xlabel(title, color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=axes is panels[0]))
        _dress(axes, "x")
        axes.tick_params(axis="y", length=0)
    panels[1].legend(
        frameon=False, labelcolor=_INK, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2
    )
    if len(report["by_adapter"]) > len(groups):
        figure.supxlabel(
            f"the {len(groups)} most asked for of {len(report['by_adapter'])} adapters",
            fontsize=9,
            color=_FAINT,
        )
    figure.savefig(path)
    return path


def _figure(
    outcome: Outcome,
    size: tuple[float, float],
    grid: tuple[int, int],
    *,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A page of panels, row by row, under the title that all pictures share."""
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(*grid, squeeze=False, sharex=sharex, sharey=sharey)
    title = f"{outcome.catalog.model.name}, {outcome.config.streams}, {len(outcome.counted)} requests"
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=_INK, parse_math=False)
    return figure, list(panels.flat)


def _dress(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#AAAAAA")
    axes.tick_params(colors=_INK, labelsize=9)
    axes.grid(axis="x" if grid == "x" else "y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
