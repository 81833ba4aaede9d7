"""Plans which rank rows the tokens of a step use. A batch that stays as it is, as in decoding, keeps its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from fusionserve.adapters.fused_tokens import FusedRange, FusedSegment, FusedTokens
from fusionserve.adapters.row_plan import (
    AdaptedTokens,
    RowPlan,
    RowRange,
    WholeModuleTokens,
    plan_segments,
    plan_spans,
    suits_segment,
)
from fusionserve.engine.fused_chunks import ChunkRange, FusedChunks
from fusionserve.engine.scheduled_batch import ScheduledChunk


@dataclass(frozen=True, slots=True)
class _Source:
    """All that a plan is made from. Equal sources have equal plans; fused tokens are equal if they are the same."""

    num_tokens: int
    adapted: tuple[AdaptedTokens, ...]
    fused: tuple[FusedTokens | FusedSegment | FusedRange, ...]
    whole_modules: tuple[WholeModuleTokens, ...]


class RowPlanner:
    """Makes plans for the kernels of a CPU; `like` is of the type that the model computes in."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._last: tuple[_Source, RowPlan] | None = None

    def plan(self, ranges: Sequence[ChunkRange], num_tokens: int, fused: Sequence[FusedChunks]) -> RowPlan:
        """The plan of these chunks, `fused` among them; the last one again if nothing it is made from has changed."""
        source = _Source(
            num_tokens,
            tuple(adapted_tokens(ranges)),
            tuple(group.tokens for group in fused),
            whole_modules(ranges),
        )
        if self._last is not None and self._last[0] == source:
            return self._last[1]
        plan = self._make(source)
        self._last = (
            None if source.whole_modules else (source, plan)
        )  # those are adapters: not kept from leaving
        return plan

    def _make(self, source: _Source) -> RowPlan:
        in_segments: list[AdaptedTokens] = []
        in_spans: list[AdaptedTokens] = []
        for tokens in source.adapted:
            is_segment = suits_segment(tokens.num_tokens, tokens.num_rows, self._like)
            (in_segments if is_segment else in_spans).append(tokens)
        fused_segments = [tokens for tokens in source.fused if isinstance(tokens, FusedSegment)]
        return RowPlan(
            source.num_tokens,
            spans=plan_spans(in_spans, dtype=self._like.dtype, device=self._like.device),
            fused=tuple(tokens for tokens in source.fused if isinstance(tokens, FusedTokens)),
            segments=plan_segments(in_segments, fused_segments, self._like),
            whole_modules=source.whole_modules,
        )


def adapted_tokens(ranges: Sequence[ChunkRange]) -> list[AdaptedTokens]:
    """The tokens of chunks with adapters on rank rows, fusions left out."""
    return [AdaptedTokens(start, end, rows) for chunk, start, end in ranges if (rows := _row_ranges(chunk))]


def whole_modules(ranges: Sequence[ChunkRange]) -> tuple[WholeModuleTokens, ...]:
    """The tokens of chunks with adapters that are more than rank rows."""
    return tuple(
        WholeModuleTokens(start, end, adapter)
        for chunk, start, end in ranges
        for adapter in chunk.request.generation.adapters
        if not adapter.weights.is_low_rank_only
    )


def _row_ranges(chunk: ScheduledChunk) -> tuple[RowRange, ...]:
    adaptation = chunk.request.generation.adaptation
    if adaptation.fusion is not None:
        return ()
    terms = zip(chunk.row_starts, adaptation.adapters, adaptation.coefficients, strict=True)
    return tuple(
        RowRange(start, start + a.num_rows, coefficient) for start, a, coefficient in terms if a.num_rows
    )
