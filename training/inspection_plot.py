"""The picture of an inspected fusion: each text in the colours of the members that lead, and its weights as heatmaps.

Columns are members, rows are tokens or layers; a long text goes on in the next block of rows, so that its tokens stay
readable. A cell is white at weight 0 and has its member's colour at weight 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Rectangle

from fusionserve.training.fusion_inspection import FloatArray, FusionInspection, InspectedText
from fusionserve.training.inspection_layout import (
    GAP,
    LABEL_CHARACTERS,
    LABEL_SIZE,
    MARGIN,
    NAME_ANGLE,
    NAME_CHARACTERS,
    ROW,
    TEXT_SIZE,
    TextPiece,
    flow_text,
    page_width,
    plan_grid,
    text_width,
)
from fusionserve.training.inspection_report import counted, layer_label
from fusionserve.training.token_texts import to_visible

MAX_TOKENS = 1000  # of a text in the picture

# Okabe and Ito's colours but the yellow, which is too light beside white; then others for large fusions.
_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7B4FA3", "#8C564B"),
    *("#B2182B", "#1B7837", "#4D5FC1", "#17A2B8", "#9A8B00", "#E377C2", "#666666", "#6BAA2E"),
)
_INK, _FAINT, _RULE = "#333333", "#8A8A8A", "#CFCFCF"
_MONO = "DejaVu Sans Mono"
_MISSING = "□"  # where the font has no such character
_DPI = 110
_MAX_PIXELS = 30000  # in height
_TITLE, _HEADING, _LINE = 0.36, 0.27, 0.2
_TINT = 0.6  # of the background at weight 1, so that black text stays readable
_MIN_NUMBER_CELL = 0.3
_NUMBERED = 10  # every such token has its number


def draw_inspection(path: Path, inspection: FusionInspection) -> None:
    """Writes a PNG. Of a text over MAX_TOKENS the tokens behind them are left out, which the picture says."""
    _Picture(inspection).save(path)


class _Section:
    """One text: what is drawn of it, and its measures."""

    def __init__(self, inspection: FusionInspection, text: InspectedText) -> None:
        self.text = text
        self.tokens = [_drawable(token) for token in text.token_texts[:MAX_TOKENS]]
        self.labels = [_cut(to_visible(token), LABEL_CHARACTERS) for token in self.tokens]
        self.by_token = text.by_token[:MAX_TOKENS]
        self.layers = [*map(_layer_name, inspection.layers), "all"]
        self.by_layer = np.vstack([inspection.by_layer(text), text.mean])
        self.grid = plan_grid(
            len(self.tokens), inspection.members, max(map(len, (*self.labels, *self.layers)))
        )
        self.pieces: list[TextPiece] = []

    def flow(self, width: float) -> None:
        beside = self.grid.layers_width + GAP if self.grid.has_many_blocks else 0
        self.pieces = list(flow_text(self.tokens, int((width - beside) / text_width(1, TEXT_SIZE))))

    @property
    def layers_height(self) -> float:
        return self.grid.names_height + len(self.layers) * ROW

    @property
    def text_height(self) -> float:
        height = (1 + max((piece.line for piece in self.pieces), default=0)) * _LINE + 0.12
        return max(height, self.layers_height + GAP) if self.grid.has_many_blocks else height

    @property
    def maps_height(self) -> float:
        height = self.grid.names_height + self.grid.num_rows * ROW
        return height if self.grid.has_many_blocks else max(height, self.layers_height)

    @property
    def height(self) -> float:
        return _HEADING + self.text_height + self.maps_height + GAP


class _Picture:
    def __init__(self, inspection: FusionInspection) -> None:
        self._inspection = inspection
        self._colours = np.array(
            [to_rgb(_COLOURS[i % len(_COLOURS)]) for i in range(len(inspection.members))]
        )
        self._sections = [_Section(inspection, text) for text in inspection.texts]
        self._width = page_width([section.grid for section in self._sections])
        for section in self._sections:
            section.flow(self._width - 2 * MARGIN)
        self._legend = list(_flow_legend(inspection.members, self._width - 2 * MARGIN - 1.5))

    def save(self, path: Path) -> None:
        head = MARGIN + _TITLE + _LINE * (1 + self._legend[-1][1]) + 0.15
        height = head + sum(section.height for section in self._sections) + MARGIN - GAP
        figure = Figure(figsize=(self._width, height), dpi=min(_DPI, _MAX_PIXELS / height))
        FigureCanvasAgg(figure)
        page = figure.add_axes((0, 0, 1, 1))
        page.set_axis_off()
        self._draw_head(page)
        top = head
        for number, section in enumerate(self._sections, start=1):
            self._draw_section(page, section, top, number)
            top += section.height
        page.set(xlim=(0, self._width), ylim=(height, 0), aspect="auto")  # images have set others
        figure.savefig(path, format="png")

    def _draw_head(self, page: Axes) -> None:
        title = f"What fusion {self._inspection.name} attends to"
        _write(page, MARGIN, MARGIN, title, size=13)
        top = MARGIN + _TITLE
        for i, (left, line) in enumerate(self._legend):
            middle = top + (line + 0.5) * _LINE
            x = MARGIN + left
            page.add_patch(Rectangle((x, middle - 0.06), 0.12, 0.12, facecolor=self._colours[i]))
            _write(page, x + 0.17, middle, self._inspection.members[i], va="center_baseline")
        right, middle = self._width - MARGIN, top + 0.5 * _LINE
        ramp = 1 - np.linspace(0, 1, 64)[None, :, None] * (1 - np.array(to_rgb("#555555")))
        _show(page, ramp, right - 0.75, middle - 0.06, 0.6, 0.12)
        _write(page, right - 0.8, middle, "weight 0", ha="right", va="center_baseline")
        _write(page, right - 0.1, middle, "1", va="center_baseline")

    def _draw_section(self, page: Axes, section: _Section, top: float, number: int) -> None:
        _write(page, MARGIN, top, self._heading(section, number), size=9, color=_FAINT)
        self._draw_text(page, section, top + _HEADING)
        self._draw_tokens(page, section, top + _HEADING + section.text_height)
        grid = section.grid
        if grid.has_many_blocks:
            left, top = self._width - MARGIN - grid.layers_width, top + _HEADING
        else:
            left, top = MARGIN + grid.block_step, top + _HEADING + section.text_height
        self._draw_layers(page, section, left + grid.label, top + grid.names_height)

    def _heading(self, section: _Section, number: int) -> str:
        text, num_tokens = section.text, len(section.text.token_ids)
        drawn = len(section.tokens)
        count = (
            counted(num_tokens, "token")
            if drawn == num_tokens
            else f"the first {drawn} of {num_tokens} tokens"
        )
        which = f"prompt {number}: " if len(self._sections) > 1 else ""
        return f"{which}{count}, mean entropy {text.entropy:.2f} of {self._inspection.max_entropy:.2f} nats"

    def _draw_text(self, page: Axes, section: _Section, top: float) -> None:
        leaders, weights = section.by_token.argmax(axis=1), section.by_token.max(axis=1)
        for piece in section.pieces:
            left = MARGIN + text_width(piece.column, TEXT_SIZE)
            y = top + piece.line * _LINE
            colour = _mix(self._colours[leaders[piece.token]], _TINT * weights[piece.token])
            width = text_width(len(piece.text), TEXT_SIZE)
            page.add_patch(
                Rectangle((left, y), width, _LINE, facecolor=colour, edgecolor="white", linewidth=0.6)
            )
            _write(page, left, y + _LINE / 2, piece.text, size=TEXT_SIZE, family=_MONO, va="center_baseline")

    def _draw_tokens(self, page: Axes, section: _Section, top: float) -> None:
        grid = section.grid
        top += grid.names_height
        for block in range(grid.num_blocks):
            start = block * grid.num_rows
            rows = section.by_token[start : start + grid.num_rows]
            left = MARGIN + block * grid.block_step + grid.label
            self._draw_map(page, rows, left, top, grid.cell)
            self._label_tokens(page, section, range(start, start + len(rows)), left, top)

    def _draw_map(self, page: Axes, weights: FloatArray, left: float, top: float, cell: float) -> None:
        """Cells and the names above them."""
        num_rows, num_members = weights.shape
        width, height = num_members * cell, num_rows * ROW
        _show(page, 1 - weights[:, :, None] * (1 - self._colours), left, top, width, height)
        for i in range(num_members + 1):
            page.plot([left + i * cell] * 2, [top, top + height], color=_RULE, linewidth=0.4)
        for i in range(num_rows + 1):
            page.plot([left, left + width], [top + i * ROW] * 2, color=_RULE, linewidth=0.4)
        for i, name in enumerate(self._inspection.members):
            _write(
                page,
                left + (i + 0.5) * cell,
                top - 0.04,
                _cut(name, NAME_CHARACTERS),
                va="bottom",
                rotation=NAME_ANGLE,
                rotation_mode="anchor",
            )

    def _label_tokens(self, page: Axes, section: _Section, tokens: range, left: float, top: float) -> None:
        for row, token in enumerate(tokens):
            y = top + (row + 0.5) * ROW
            _write(
                page, left - 0.06, y, section.labels[token], family=_MONO, ha="right", va="center_baseline"
            )
            if token % _NUMBERED == 0:
                number_left = left - section.grid.label
                _write(page, number_left, y, str(token), size=6, color=_FAINT, va="center_baseline")

    def _draw_layers(self, page: Axes, section: _Section, left: float, top: float) -> None:
        cell = section.grid.layer_cell
        self._draw_map(page, section.by_layer, left, top, cell)
        for row, name in enumerate(section.layers):
            y = top + (row + 0.5) * ROW
            _write(page, left - 0.06, y, name, ha="right", va="center_baseline")
            for i, weight in enumerate(section.by_layer[row] if cell >= _MIN_NUMBER_CELL else ()):
                x = left + (i + 0.5) * cell
                colour = "white" if _is_dark(_mix(self._colours[i], float(weight))) else _INK
                _write(page, x, y, f"{weight:.2f}", size=6.5, color=colour, ha="center", va="center_baseline")


def _flow_legend(names: Sequence[str], width: float) -> list[tuple[float, int]]:
    """(left, line) of each name with its square."""
    places: list[tuple[float, int]] = []
    left, line = 0.0, 0
    for name in names:
        step = 0.32 + text_width(len(name), LABEL_SIZE)
        if left and left + step > width:
            left, line = 0.0, line + 1
        places.append((left, line))
        left += step
    return places


def _show(page: Axes, image: FloatArray, left: float, top: float, width: float, height: float) -> None:
    page.imshow(
        np.clip(image, 0, 1),
        extent=(left, left + width, top + height, top),
        interpolation="nearest",
        aspect="auto",
    )


def _write(page: Axes, x: float, y: float, text: str, **style: object) -> None:
    options: dict[str, object] = {"size": LABEL_SIZE, "color": _INK, "va": "top", **style}
    page.text(x, y, text, parse_math=False, **options)  # type: ignore[arg-type]


def _mix(colour: FloatArray, share: float) -> tuple[float, float, float]:
    red, green, blue = 1 - share * (1 - colour)
    return float(red), float(green), float(blue)


def _is_dark(colour: tuple[float, float, float]) -> bool:
    red, green, blue = colour
    return 0.3 * red + 0.59 * green + 0.11 * blue < 0.5


def _layer_name(path: str) -> str:
    label = layer_label(path)
    return _cut(f"layer {label}" if label.isdecimal() else label, LABEL_CHARACTERS)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _drawable(text: str) -> str:
    """`text` with a box for every printable character that the font lacks, instead of a warning for each."""
    font = get_font(findfont(_MONO))
    return "".join(
        character if not character.isprintable() or font.get_char_index(ord(character)) else _MISSING
        for character in text
    )
