"""Groups the chunks of a batch that one fusion adapts, and gives each its part of the fusion weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fusionserve.adapters.fused_tokens import FusedRange, FusedSegment, FusedTokens
from fusionserve.adapters.fusion_rows import FusionRows
from fusionserve.adapters.row_plan import suits_segment
from fusionserve.engine.fusion_report import ChunkWeights
from fusionserve.engine.scheduler import ScheduledChunk
from fusionserve.kernels.device.triton_use import uses_triton

ChunkRange = tuple[ScheduledChunk, int, int]  # a chunk and its rows [start, end) in the batch


@dataclass(frozen=True, slots=True)
class FusedChunks:
    """Neighbouring chunks of one fusion, served together."""

    tokens: FusedTokens | FusedSegment | FusedRange
    ranges: tuple[ChunkRange, ...]


def plan_fused(ranges: Sequence[ChunkRange], like: Tensor) -> list[FusedChunks]:
    """One group for each fusion in the batch, in which chunks of a fusion stand side by side.

    `like` is of the type and device that the model computes in.
    """
    fused = [r for r in ranges if r[0].request.generation.adaptation.fusion is not None]
    return [_group(tuple(group), like) for _, group in groupby(fused, key=lambda r: r[0].row_starts)]


def fused_ranges(groups: Sequence[FusedChunks]) -> list[FusedRange]:
    """Those for the kernels of a GPU."""
    return [group.tokens for group in groups if isinstance(group.tokens, FusedRange)]


def gather_weights(groups: Sequence[FusedChunks]) -> dict[ScheduledChunk, ChunkWeights]:
    """The fusion weights of every fused chunk after the forward pass."""
    found: dict[ScheduledChunk, ChunkWeights] = {}
    for group in groups:
        if group.tokens.weights:
            weights = ChunkWeights.gather(group.tokens.weights)
            first = group.ranges[0][1]
            found |= {chunk: weights.part(start - first, end - first) for chunk, start, end in group.ranges}
    return found


def _group(ranges: tuple[ChunkRange, ...], like: Tensor) -> FusedChunks:
    chunk, start, _ = ranges[0]
    end = ranges[-1][2]
    fusion = chunk.request.generation.adaptation.fusion
    assert fusion is not None
    rows = fusion.content.folded.rows
    kind = _kind(end - start, rows, like)
    return FusedChunks(kind(start, end, chunk.row_starts[0], rows, _allowed(ranges)), ranges)


def _kind(
    num_tokens: int, rows: FusionRows, like: Tensor
) -> type[FusedTokens] | type[FusedSegment] | type[FusedRange]:
    if uses_triton(like.device):
        return FusedRange
    return FusedSegment if suits_segment(num_tokens, rows.num_member_rows, like) else FusedTokens


def _allowed(ranges: Sequence[ChunkRange]) -> Tensor:
    """Which members may take part: [members] if all chunks agree, else [tokens, members]."""
    adaptations = [chunk.request.generation.adaptation for chunk, _, _ in ranges]
    if all(adaptation.excluded == adaptations[0].excluded for adaptation in adaptations):
        return adaptations[0].allowed_members
    rows = zip(adaptations, ranges, strict=True)
    return torch.cat([a.allowed_members.expand(end - start, -1) for a, (_, start, end) in rows])
