"""Groups the chunks of a batch that one fusion adapts, and gives each its part of the fusion weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from fusionserve.adapters.fused_tokens import FusedRange, FusedSegment, FusedTokens
from fusionserve.adapters.fusion_rows import FusionRows
from fusionserve.adapters.row_plan import suits_segment
from fusionserve.engine.fused_weights import ChunkWeights, FusedWeights
from fusionserve.engine.scheduled_batch import ScheduledChunk
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.host_copy import HostCopy

ChunkRange = tuple[ScheduledChunk, int, int]  # a chunk and its rows [start, end) in the batch


@dataclass(frozen=True, slots=True)
class FusedChunks:
    """Neighbouring chunks of one fusion, served together."""

    rows: FusionRows
    tokens: FusedTokens | FusedSegment | FusedRange
    ranges: tuple[ChunkRange, ...]

    def weights(self) -> tuple[tuple[str, ...], Tensor] | None:
        """The attentions' paths and their weights, of which `rows.own_weights` are the fusion's; None without any."""
        found = self.tokens.weights
        if isinstance(found, dict):
            return (tuple(found), torch.stack(list(found.values()))) if found else None
        assert isinstance(self.tokens, FusedRange)
        return None if found is None else (self.tokens.attentions, found)


class FusedPlanner:
    """Groups fused chunks step by step. What stays as it was, as in decoding, keeps what was made for it.

    `like` is of the type and device that the model computes in.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._segments: dict[Hashable, FusedSegment] = {}  # of the last step, by all that they were made from

    def plan(self, ranges: Sequence[ChunkRange]) -> list[FusedChunks]:
        """One group for each fusion in the batch, in which chunks of a fusion stand side by side."""
        known, self._segments = self._segments, {}
        fused = [r for r in ranges if r[0].request.generation.adaptation.fusion is not None]
        return [
            self._group(tuple(group), known) for _, group in groupby(fused, key=lambda r: r[0].row_starts)
        ]

    def _group(self, ranges: tuple[ChunkRange, ...], known: Mapping[Hashable, FusedSegment]) -> FusedChunks:
        chunk, start, _ = ranges[0]
        end, row_start = ranges[-1][2], chunk.row_starts[0]
        fusion = chunk.request.generation.adaptation.fusion
        assert fusion is not None
        rows = fusion.content.folded.rows
        kind = _kind(end - start, rows, self._like)
        if kind is not FusedSegment:
            return FusedChunks(rows, kind(start, end, row_start, rows, _allowed(ranges)), ranges)
        excluded = [(r[0].request.generation.adaptation.excluded, r[1]) for r in ranges]
        key = (start, end, row_start, rows, *excluded)
        segment = known.get(key) or FusedSegment(start, end, row_start, rows, _allowed(ranges))
        segment.begin_step()
        self._segments[key] = segment
        return FusedChunks(rows, segment, ranges)


def fused_ranges(groups: Sequence[FusedChunks]) -> list[FusedRange]:
    """Those for the kernels of a GPU."""
    return [group.tokens for group in groups if isinstance(group.tokens, FusedRange)]


class LateWeights:
    """The fusion weights of every fused chunk after the forward pass, on their way to the host."""

    def __init__(self, groups: Sequence[FusedChunks]) -> None:
        found = [(group, weights) for group in groups if (weights := group.weights()) is not None]
        self._late = [(group, modules, HostCopy(weights)) for group, (modules, weights) in found]

    def read(self) -> dict[ScheduledChunk, ChunkWeights]:
        """Waits until they are there."""
        found: dict[ScheduledChunk, ChunkWeights] = {}
        for group, modules, late in self._late:
            weights = FusedWeights.of(modules, group.rows.own_weights(late.read()))
            first = group.ranges[0][1]
            found |= {
                chunk: ChunkWeights(weights, start - first, end - first) for chunk, start, end in group.ranges
            }
        return found


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
