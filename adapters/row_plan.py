"""Which rank rows of the adapter pool each token of a batch uses, cut into spans that one product serves.

A span is a rectangle: neighbouring tokens by neighbouring rank rows, with a coefficient for each pair. Decoding tokens
of many adapters share one wide span (most coefficients zero); a long prompt gets a narrow one of its own. The choice is
made by `span_cost`, not by phase. Where the native kernel can be had, a segment takes the place of all but the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.fused_tokens import FusedSegment, FusedTokens
from fusionserve.kernels.low_rank import zeros_of
from fusionserve.kernels.rank_panels import has_panels
from fusionserve.kernels.segments import Segment, Segments, can_add

if TYPE_CHECKING:
    from fusionserve.kernels.device.rank_items import RankItems

# Measured on two cores in units of one token by one rank row of a 2,048-wide pair of A and B (about 40 ns):
# starting a span's two products costs as much as about 1,000 of them, reading a rank row from memory about 5.
_SPAN_COST = 1000
_ROW_COST = 5
# Natively, as a segment, starting costs nothing, but a token by a rank row costs more than in a product: in bfloat16
# half as much again, in float32 four times. So many token-rows are still cheaper as a segment. In float16 all are:
# torch's products are slow there, and rounded so coarsely that company would show.
_MOST_IN_SEGMENT = {torch.bfloat16: 65_536, torch.float32: 4_096, torch.float16: math.inf}

_LEAST_INPUTS = 2  # of modules whose rank rows may lie in panels


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rank rows [start, end) of the pool, and the coefficient of the adapter that owns them."""

    start: int
    end: int
    coefficient: float


@dataclass(frozen=True, slots=True)
class AdaptedTokens:
    """Tokens [start, end) of the batch belong to one request, adapted by `rows`; base tokens are not listed."""

    start: int
    end: int
    rows: tuple[RowRange, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of the request."""
        return self.end - self.start

    @property
    def num_rows(self) -> int:
        """Rank rows of all its adapters."""
        return sum(rows.end - rows.start for rows in self.rows)

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """The ranges without their coefficients."""
        return tuple((rows.start, rows.end) for rows in self.rows)


@dataclass(frozen=True, slots=True)
class WholeModuleTokens:
    """Tokens [start, end) of an adapter that also changes modules in ways rank rows cannot say: DoRA, saved modules."""

    start: int
    end: int
    whole_module: Adapter

    def changes(self, path: str) -> bool:
        """True if the adapter does so to the module at `path`."""
        content = self.whole_module.content
        return path in content.column_scales or path in content.weights.replacements


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens [token_start, token_end) by rank rows [row_start, row_end)."""

    token_start: int
    token_end: int
    row_start: int
    row_end: int
    coefficients: Tensor  # [tokens, rows], or [1, rows] where all tokens share them
    left_out: Tensor | None  # where the coefficients are zero, or None if nowhere


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """What the native kernel computes: the segments of adapters and of fusions, together as it takes them."""

    adapted: tuple[Segment, ...]
    fused: tuple[FusedSegment, ...]
    together: Segments


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What the adapted layers need to know of a batch.

    Segments, or spans and fused tokens where those are cheaper, or items on a GPU; and whole-module changes.
    """

    num_tokens: int
    spans: tuple[Span, ...] = ()
    fused: tuple[FusedTokens, ...] = ()
    segments: SegmentPlan | None = None
    items: RankItems | None = None
    whole_modules: tuple[WholeModuleTokens, ...] = ()

    @property
    def is_empty(self) -> bool:
        """True if every token is the base's."""
        return not (self.spans or self.fused or self.segments or self.items or self.whole_modules)

    @property
    def is_segments_only(self) -> bool:
        """True if native kernels do all of it: base tokens and segments."""
        return not (self.spans or self.fused or self.items or self.whole_modules)


EMPTY_PLAN = RowPlan(num_tokens=0)


class PlanCell:
    """Holds the plan of the step at hand; the adapted layers read it, the model runner writes it."""

    def __init__(self) -> None:
        self.plan = EMPTY_PLAN


def suits_segment(num_tokens: int, num_rows: int, like: Tensor) -> bool:
    """True if so many tokens by so many rank rows are cheaper as a segment than as products of their own.

    Rows that lie in panels are for segments only.
    """
    if has_panels(_LEAST_INPUTS, like):
        return True
    return num_tokens * num_rows <= _MOST_IN_SEGMENT.get(like.dtype, 0) and can_add(like)


def plan_segments(
    adapted: Sequence[AdaptedTokens], fused: Sequence[FusedSegment], like: Tensor
) -> SegmentPlan | None:
    """Segments for the adapted tokens, given in ascending order, and for the fused ones; None if there are none."""
    segments = tuple(segment for group in alike(adapted) for segment in _segments(group))
    together = [*segments, *(tokens.segment for tokens in fused)]
    return SegmentPlan(segments, tuple(fused), Segments(together, like)) if together else None


def alike(adapted: Iterable[AdaptedTokens]) -> Iterator[list[AdaptedTokens]]:
    """Neighbours on the same rank rows, which read them together."""
    group: list[AdaptedTokens] = []
    for tokens in adapted:
        if group and not (group[-1].end == tokens.start and group[-1].places == tokens.places):
            yield group
            group = []
        group.append(tokens)
    if group:
        yield group


def _segments(group: Sequence[AdaptedTokens]) -> Iterator[Segment]:
    """One for each adapter of the group."""
    start, end = group[0].start, group[-1].end
    for index, rows in enumerate(group[0].rows):
        of_tokens = [t.rows[index].coefficient for t in group for _ in range(t.start, t.end)]
        if len(set(of_tokens)) == 1:
            del of_tokens[1:]
        coefficients = torch.tensor(of_tokens)[:, None].expand(-1, rows.end - rows.start).contiguous()
        yield Segment(start, end, rows.start, rows.end, rows.end - rows.start, coefficients)


def span_cost(num_tokens: int, num_rows: int) -> int:
    """Cost of one span in token-rows: a constant, the rows read, and the products."""
    return _SPAN_COST + num_rows * (_ROW_COST + num_tokens)


def plan_spans(
    adapted: Sequence[AdaptedTokens], *, dtype: torch.dtype, device: torch.device
) -> tuple[Span, ...]:
    """Cuts adapted tokens, given in ascending order, into spans; neighbours merge while that is cheaper."""
    return tuple(_build_span(group, dtype, device) for group in _group(adapted))


def _group(adapted: Iterable[AdaptedTokens]) -> list[list[AdaptedTokens]]:
    groups: list[list[AdaptedTokens]] = []
    for tokens in adapted:
        if groups and _cost([*groups[-1], tokens]) <= _cost(groups[-1]) + _cost([tokens]):
            groups[-1].append(tokens)
        else:
            groups.append([tokens])
    return groups


def _cost(group: Sequence[AdaptedTokens]) -> int:
    row_start, row_end = _hull(group)
    return span_cost(group[-1].end - group[0].start, row_end - row_start)


def _hull(group: Sequence[AdaptedTokens]) -> tuple[int, int]:
    rows = [row_range for tokens in group for row_range in tokens.rows]
    return min(r.start for r in rows), max(r.end for r in rows)


def _build_span(group: Sequence[AdaptedTokens], dtype: torch.dtype, device: torch.device) -> Span:
    row_start, row_end = _hull(group)
    token_start, token_end = group[0].start, group[-1].end
    num_token_rows = 1 if len(group) == 1 else token_end - token_start
    coefficients = torch.zeros(num_token_rows, row_end - row_start)
    for tokens in group:
        here = (
            slice(None)
            if num_token_rows == 1
            else slice(tokens.start - token_start, tokens.end - token_start)
        )
        for rows in tokens.rows:
            coefficients[here, rows.start - row_start : rows.end - row_start] += rows.coefficient
    coefficients = coefficients.to(dtype)
    left_out = zeros_of(coefficients)  # before they go to the device, which nobody should wait for
    return Span(
        token_start,
        token_end,
        row_start,
        row_end,
        coefficients.to(device),
        None if left_out is None else left_out.to(device),
    )
