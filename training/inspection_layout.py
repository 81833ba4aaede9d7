"""Where the parts of an inspection's picture go. Lengths are in inches, texts are monospaced."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fusionserve.training.token_texts import to_visible

TEXT_SIZE, LABEL_SIZE = 9.0, 7.5  # points
LABEL_CHARACTERS, NAME_CHARACTERS = 14, 18
MARGIN, GAP, ROW = 0.3, 0.3, 0.165
NAME_ANGLE = 50  # degrees, of the names above their columns

_LINES = re.compile(r"[^\n]*\n|[^\n]+")
_POINTS_PER_INCH = 72
_CHARACTER = 0.602  # of the size, the width of a monospaced character
_NUMBER = 0.34  # beside a token's label
_MIN_WIDTH, _MAX_WIDTH = 8.0, 13.0
_ROWS_PER_BLOCK = 40
_FEW_TOKENS = 40


@dataclass(frozen=True, slots=True)
class TextPiece:
    """A part of token `token` that stands on one line."""

    token: int
    line: int
    column: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Heatmaps: the tokens of a text in blocks of equal length, and the layers.

    The layers stand beside the only block; where there are more they stand beside the text, which is above.
    """

    num_members: int
    num_blocks: int
    num_rows: int  # tokens in a block
    label: float  # width of what stands left of a row: a number and a text
    cell: float  # width of a token's cell
    layer_cell: float
    names_height: float

    @property
    def block_step(self) -> float:
        """From the left of a block to that of the next."""
        return self.label + self.num_members * self.cell + GAP

    @property
    def has_many_blocks(self) -> bool:
        """True if the layers stand beside the text."""
        return self.num_blocks > 1

    @property
    def layers_width(self) -> float:
        """Of the layers, the last name's overhang included."""
        return self.label + self.num_members * self.layer_cell + self.names_height

    @property
    def width(self) -> float:
        """Of a row of heatmaps."""
        beside = self.names_height if self.has_many_blocks else self.layers_width
        return self.num_blocks * self.block_step + beside


def plan_grid(num_tokens: int, names: Sequence[str], label_characters: int) -> Grid:
    """Blocks that are about as high as wide, as far as the page allows; few tokens have wide cells."""
    wide = _clamp(2.2 / len(names), 0.17, 0.42)
    narrow = _clamp(1.3 / len(names), 0.155, 0.24)
    longest = min(NAME_CHARACTERS, max(map(len, names)))
    one = Grid(
        num_members=len(names),
        num_blocks=1,
        num_rows=num_tokens,
        label=text_width(min(label_characters, LABEL_CHARACTERS), LABEL_SIZE) + _NUMBER,
        cell=wide if num_tokens <= _FEW_TOKENS else narrow,
        layer_cell=wide,
        names_height=text_width(longest, LABEL_SIZE) * math.sin(math.radians(NAME_ANGLE)) + 0.12,
    )
    num_fitting = int((_MAX_WIDTH - 2 * MARGIN - one.names_height) / one.block_step)
    num_blocks = min(math.ceil(num_tokens / _ROWS_PER_BLOCK), max(1, num_fitting))
    if num_blocks > 1:  # wider cells where the page has room for them
        step = (_MIN_WIDTH - 2 * MARGIN - one.names_height) / num_blocks
        one = replace(one, cell=_clamp((step - one.label - GAP) / len(names), one.cell, wide))
    return replace(one, num_blocks=num_blocks, num_rows=math.ceil(num_tokens / num_blocks))


def page_width(grids: Sequence[Grid]) -> float:
    """Wide enough for the widest of them, and for a line of text that is pleasant to read."""
    return max(_MIN_WIDTH, *(2 * MARGIN + grid.width for grid in grids))


def text_width(num_characters: int, size: float) -> float:
    """Of a monospaced text."""
    return num_characters * _CHARACTER * size / _POINTS_PER_INCH


def flow_text(tokens: Sequence[str], max_columns: int) -> Iterator[TextPiece]:
    """The text in lines: a token that does not fit starts the next, and every end of a line is followed."""
    line = column = 0
    for token, text in enumerate(tokens):
        for part in _LINES.findall(text):
            shown = to_visible(part, space=" ")
            if column and column + len(shown) > max_columns:
                line, column = line + 1, 0
            for start in range(0, len(shown), max_columns):
                piece = shown[start : start + max_columns]
                line, column = (line + 1, 0) if start else (line, column)
                yield TextPiece(token, line, column, piece)
                column += len(piece)
            if part.endswith("\n"):
                line, column = line + 1, 0


def _clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))
