"""Carries out a scheduled batch: copies adapters into the pool, makes the tensors, runs the model once, samples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusionserve import metrics
from fusionserve.adapters.pool_ledger import WriteRows
from fusionserve.adapters.row_plan import RowPlan
from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.cache_memory import CacheMemory
from fusionserve.engine.cache_need import cache_bytes_per_token, check_context_fits
from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_chunks import (
    ChunkRange,
    FusedChunks,
    FusedPlanner,
    LateWeights,
    fused_ranges,
)
from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.logit_rows import LogitRows, plan_logit_rows, sampler_row, to_results
from fusionserve.engine.row_planner import RowPlanner, adapted_tokens, whole_modules
from fusionserve.engine.sampler import choose
from fusionserve.engine.scheduled_batch import ScheduledBatch, ScheduledChunk
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.index_tensor import index_tensor
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.paged_batch import PagedBatch
from fusionserve.kernels.paged_sequence import PackedSequence

if TYPE_CHECKING:
    from fusionserve.engine.decode_graphs import DecodeGraphs, DecodeStep
    from fusionserve.engine.device_plan import DevicePlanner


class ModelRunner:
    """Owns the model, the KV cache and the adapter pool's tensors. Used by one thread only."""

    def __init__(self, base: BaseModel, *, block_size: int, num_blocks: int) -> None:
        self._base = base
        self._block_size = block_size
        self._like = torch.empty(0, dtype=base.dtype, device=base.device)
        self._fused, self._fused_logits = FusedPlanner(self._like), FusedPlanner(self._like)
        self._rows, self._logit_rows = RowPlanner(self._like), RowPlanner(self._like)
        self._device_planner: DevicePlanner | None = None
        self._graphs: DecodeGraphs | None = None
        on_device = uses_triton(base.device)
        num_slots = block_size * (num_blocks + on_device)  # the last block is nobody's: padding goes there
        pages = HugePages()
        self._caches = {
            module: LayerCache.zeros(self._like, num_slots, block_size, shape.sizes, pages)
            for module, shape in base.cache_shapes.items()
        }
        self.cache_memory = CacheMemory(self._caches.values())
        if on_device:
            self._prepare_device(num_blocks)

    def _prepare_device(self, trash_block: int) -> None:
        """Imports what needs Triton, which a server on a CPU does without."""
        from fusionserve.engine.decode_graphs import DecodeGraphs
        from fusionserve.engine.device_plan import DevicePlanner

        self._device_planner = DevicePlanner(self._base.modules, self._like)
        self._graphs = DecodeGraphs(
            self._base,
            self._caches,
            self._device_planner,
            block_size=self._block_size,
            trash_block=trash_block,
        )

    @torch.inference_mode()
    def warm_up(self, max_requests: int) -> None:
        """Records the steps of up to so many requests without adapters, on a GPU, and compiles adapters' kernels."""
        if self._graphs is not None and self._base.device.type == "cuda":
            self._graphs.record_base(max_requests)
            self._compile_adapter_kernels()

    def _compile_adapter_kernels(self) -> None:
        from fusionserve.engine.kernel_warm_up import launch_adapter_kernels

        assert self._device_planner is not None
        launch_adapter_kernels(self._base, self._device_planner)

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> list[ChunkResult]:
        """Runs the batch; one result per chunk, in any order. Raises CopyError before anything is computed."""
        self._copy_adapters(batch)
        if not batch.chunks:
            return []
        chunks = sorted(batch.chunks, key=_batch_order)
        starts = [0, *accumulate(chunk.num_tokens for chunk in chunks)]
        logit_rows = plan_logit_rows(chunks, starts)
        fused = self._fused.plan(_ranges(chunks, starts))
        if self._graphs is not None and all(chunk.is_plain for chunk in chunks):
            logits = self._graphs.run(self._decode_step(chunks, fused))
        else:
            logits = self._forward(chunks, starts, logit_rows, fused)
        return to_results(logit_rows, logits, self._base.eos_token_ids, LateWeights(fused))

    @property
    def runs_ahead(self) -> bool:
        """True if `launch` comes back before the device is done."""
        return self._graphs is not None and self._base.device.type == "cuda"

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        """Begins a step of plain chunks, without changes to the pool; their tokens are those of `before`, if given.

        All is in the order of one stream: what this step reads is written before, and what follows, be it to blocks or
        rank rows that the host gives away meanwhile, comes behind it.
        """
        chunks = sorted(batch.chunks, key=_batch_order)
        fused = self._fused.plan(_ranges(chunks, range(len(chunks))))
        assert self._graphs is not None
        logits = self._graphs.run(self._decode_step(chunks, fused, before))
        drawn = choose(logits, [sampler_row(chunk, self._base.eos_token_ids) for chunk in chunks])
        return LaunchedStep(batch, chunks, drawn, LateWeights(fused))

    def _copy_adapters(self, batch: ScheduledBatch) -> None:
        self._base.pool.apply(batch.pool_changes)
        metrics.ADAPTER_ACTIVATIONS.inc(sum(isinstance(change, WriteRows) for change in batch.pool_changes))
        self._base.pool.copy_ahead(batch.copies)
        metrics.ADAPTER_ACTIVATIONS.inc(len(batch.copies))

    def _forward(
        self,
        chunks: Sequence[ScheduledChunk],
        starts: Sequence[int],
        logit_rows: Sequence[LogitRows],
        fused: Sequence[FusedChunks],
    ) -> Tensor:
        """Logits [logit rows, vocab] of the packed chunks."""
        base = self._base
        sequences = [self._pack(chunk, start) for chunk, start in zip(chunks, starts, strict=False)]
        wanted = [place for rows in logit_rows for place in rows.places]
        logit_ranges = [(rows.chunk, rows.start, rows.end) for rows in logit_rows if rows.places]
        plan = self._plan(self._rows, _ranges(chunks, starts), starts[-1], fused)
        fused_logits = self._fused_logits.plan(logit_ranges)
        logit_plan = self._plan(self._logit_rows, logit_ranges, len(wanted), fused_logits)
        with base.planned(plan, logit_plan):
            logits = base.logits(
                self._tensor([t for c in chunks for t in c.request.token_ids[c.start : c.end]]),
                self._tensor([p for c in chunks for p in range(c.start, c.end)]),
                self._wanted(wanted, starts[-1]),
                AttentionBatch(self._caches, PagedBatch(sequences, self._block_size, self._like.device)),
            )
        if self._device_planner is not None and plan.items is not None:
            self._device_planner.collect_weights(fused_ranges(fused), plan.items)
        return logits

    def _plan(
        self, rows: RowPlanner, ranges: Sequence[ChunkRange], num_tokens: int, fused: Sequence[FusedChunks]
    ) -> RowPlan:
        if self._device_planner is None:
            return rows.plan(ranges, num_tokens, fused)
        items = self._device_planner.items(adapted_tokens(ranges), fused_ranges(fused))
        return RowPlan(num_tokens, items=items, whole_modules=whole_modules(ranges))

    def _decode_step(
        self,
        chunks: Sequence[ScheduledChunk],
        fused: Sequence[FusedChunks],
        before: LaunchedStep | None = None,
    ) -> DecodeStep:
        """One token of each; those of `before`, if given, are on the device only."""
        from fusionserve.engine.decode_graphs import DecodeStep

        return DecodeStep(
            [0 if before else chunk.request.token_ids[chunk.start] for chunk in chunks],
            [self._pack(chunk, place) for place, chunk in enumerate(chunks)],
            adapted_tokens(_ranges(chunks, range(len(chunks)))),
            fused_ranges(fused),
            late_ids=None if before is None else before.drawn_ids(chunks),
        )

    def _pack(self, chunk: ScheduledChunk, start: int) -> PackedSequence:
        num_blocks = -(-chunk.end // self._block_size)
        blocks = chunk.request.blocks[:num_blocks]
        return PackedSequence(start, start + chunk.num_tokens, chunk.start, blocks)

    def _wanted(self, places: Sequence[int], num_tokens: int) -> Tensor | None:
        """Which logits to compute; None: all."""
        return None if len(places) == num_tokens else self._tensor(places)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return index_tensor(values, self._like.device)


def num_cache_blocks(base: BaseModel, *, block_size: int, budget_bytes: int, max_requests: int) -> int:
    """Blocks that fit the budget, and no more than `max_requests` full contexts could use.

    Raises StartupError if not even one full context fits.
    """
    per_token, max_tokens = cache_bytes_per_token(base.cache_shapes, base.dtype), base.max_context_tokens
    check_context_fits(max_tokens, per_token, block_size=block_size, budget_bytes=budget_bytes)
    per_context = -(-max_tokens // block_size)
    return min(budget_bytes // (per_token * block_size), per_context * max_requests)


def _batch_order(chunk: ScheduledChunk) -> tuple[int, tuple[int, ...]]:
    """Base tokens first, then adapted ones by their place in the pool, so that neighbours share spans.

    Short chunks of adapters come before long ones; fusions come last, each in one piece.
    """
    if chunk.request.generation.adaptation.fusion is not None:
        return (3, chunk.row_starts)
    return (bool(chunk.row_starts) * (1 + (chunk.num_tokens > 1)), chunk.row_starts)


def _ranges(chunks: Sequence[ScheduledChunk], starts: Sequence[int]) -> list[ChunkRange]:
    return [(chunk, start, start + chunk.num_tokens) for chunk, start in zip(chunks, starts, strict=False)]
