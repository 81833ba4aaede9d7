"""Decoding steps on a GPU, recorded once per size as CUDA graphs and replayed on buffers of their own.

A graph has the kernels of a forward pass with all their addresses, so a step costs one launch instead of thousands.
What changes from step to step is copied into its buffers first: tokens, positions, slots, block tables, and the tables
of adapted tokens. Buffers are padded: what is not a token of a request writes to a block that is nobody's. A step
without adapters replays a graph without their kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from fusionserve.adapters.fused_tokens import FusedRange
from fusionserve.adapters.row_plan import AdaptedTokens, RowPlan
from fusionserve.engine.attention import AttentionBatch
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.device_plan import DevicePlanner
from fusionserve.engine.graph_recorder import GraphRecorder, RecordError
from fusionserve.kernels.device.paged_launch import DeviceBatch, DeviceQueries, QueryTables, make_query_tables
from fusionserve.kernels.device.rank_items import RankItems, RankTables
from fusionserve.kernels.device.table_image import TableImage
from fusionserve.kernels.device.triton_use import num_lanes
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.paged_sequence import PackedSequence

_LEAST_ITEMS = 16
_MOST_ADAPTING = 64  # graphs with adapters; each takes some megabytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GraphSize:
    """What a graph has room for: powers of two, or nothing of its kind."""

    num_tokens: int
    num_items: int = 0
    num_fused: int = 0  # tokens of fusions
    num_groups: int = 0
    num_member_rows: int = 0
    fusion_width: int = 0

    @classmethod
    def of(cls, num_tokens: int, tables: RankTables | None, most_members: int) -> GraphSize:
        """The least size that holds a step."""
        if tables is None:
            return cls(num_lanes(num_tokens))
        return cls(
            num_lanes(num_tokens),
            num_items=num_lanes(len(tables.items), _LEAST_ITEMS),
            num_fused=_room(len(tables.fused)),
            num_groups=_room(len(tables.groups)),
            num_member_rows=_room(len(tables.member_of_row)),
            fusion_width=_room(most_members),
        )


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One new token of each request: ids, packed places, and what adapts them.

    `late_ids` [num_tokens] stand in for ids that only the device knows yet.
    """

    token_ids: Sequence[int]
    sequences: Sequence[PackedSequence]
    adapted: Sequence[AdaptedTokens]
    fused: Sequence[FusedRange]
    late_ids: Tensor | None = None


class DecodeGraphs:
    """The graphs of one base, each recorded when its size is first met. `trash_block` may be written by anybody."""

    def __init__(
        self,
        base: BaseModel,
        caches: Mapping[nn.Module, LayerCache],
        planner: DevicePlanner,
        *,
        block_size: int,
        trash_block: int,
    ) -> None:
        self._base, self._caches, self._planner = base, caches, planner
        self._block_size, self.trash_slot = block_size, trash_block * block_size
        self._recorder = GraphRecorder() if can_be_recorded(base) else None
        self._graphs: dict[GraphSize, _Graph] = {}
        self._layout = base.pool.layout

    def record_base(self, max_tokens: int) -> None:
        """Records the graphs of steps without adapters, with a progress bar on a terminal."""
        sizes = [1 << power for power in range(num_lanes(max_tokens).bit_length())]
        for num_tokens in tqdm(sizes, desc="recording steps", disable=None, leave=False):
            self._graph(GraphSize(num_tokens)).replay()

    def run(self, step: DecodeStep) -> Tensor:
        """Logits [num_tokens, vocab] of the step, in memory that the next one overwrites."""
        tables = self._planner.tables(step.adapted, step.fused)
        most_members = max((tokens.rows.num_members for tokens in step.fused), default=0)
        graph = self._graph(GraphSize.of(len(step.token_ids), tables, most_members))
        graph.fill(step, tables)
        graph.replay()
        if graph.items is not None:
            self._planner.collect_weights(step.fused, graph.items)
        return graph.logits[: len(step.token_ids)]

    def _graph(self, size: GraphSize) -> _Graph:
        if self._layout != self._base.pool.layout:
            self._forget_adapters()
        graph = self._graphs.pop(size, None) or _Graph(self, size)
        self._graphs[size] = graph  # the last one used
        adapting = [other for other in self._graphs if other.num_items]
        if len(adapting) > _MOST_ADAPTING:
            # Its last replay is over: of two steps that the device may have, one is read before the next is begun.
            del self._graphs[adapting[0]]
        return graph

    def _forget_adapters(self) -> None:
        """The pool's rows lie elsewhere than the graphs that have adapters say. Nothing else is in the others."""
        self._layout = self._base.pool.layout
        self._graphs = {size: graph for size, graph in self._graphs.items() if not size.num_items}
        if self._recorder is not None and not self._graphs:
            self._recorder = GraphRecorder()

    def make_buffers(self, num_tokens: int) -> tuple[Tensor, DeviceQueries]:
        """Ids, positions and slots [3, num_tokens], and the tables of queries: all of nobody."""
        device = self._base.device
        width = -(-self._base.max_context_tokens // self._block_size)
        numbers = torch.zeros(3, num_tokens, dtype=torch.long, device=device)
        numbers[2] = self.trash_slot
        tiles = torch.zeros(num_tokens, 4, dtype=torch.int32, device=device)
        blocks = torch.zeros(num_tokens, width, dtype=torch.int32, device=device)
        nothing = QueryTables(tiles[:0], blocks[:0], 1)
        return numbers, DeviceQueries(QueryTables(tiles, blocks, 1), nothing, self._block_size)

    def make_tables(self, size: GraphSize) -> TableImage | None:
        """Tables of adapted tokens that hold nothing."""
        if not size.num_items:
            return None
        return self._planner.empty_tables(
            num_items=size.num_items,
            num_groups=size.num_groups,
            num_fused=size.num_fused,
            num_member_rows=size.num_member_rows,
        )

    def make_items(self, image: TableImage, size: GraphSize) -> RankItems:
        """Those of the tables, and their scratch."""
        return self._planner.items_of(image.tables, size.fusion_width)

    def forward(self, numbers: Tensor, queries: DeviceQueries, items: RankItems | None) -> Tensor:
        """Logits [num_tokens, vocab] of all buffers' tokens."""
        base = self._base
        num_tokens = numbers.shape[1]
        with base.planned(RowPlan(num_tokens, items=items)):
            batch = AttentionBatch(self._caches, DeviceBatch(queries, numbers[2]))
            return base.logits(numbers[0], numbers[1], None, batch)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """What does the same: the function itself where it cannot be recorded."""
        if self._recorder is None:
            return function
        try:
            return self._recorder.record(function)
        except RecordError as error:
            _log.warning("decoding steps are not recorded as CUDA graphs, and slower: %s", error)
            self._recorder = None
            return function


def can_be_recorded(base: BaseModel) -> bool:
    """True on a GPU if no part of a step waits for it.

    The experts of transformers multiply with torch's `grouped_mm`, which reads the groups' sizes on the host unless all
    is in bfloat16.
    """
    if base.device.type != "cuda" or base.dtype is torch.bfloat16:
        return base.device.type == "cuda"
    return not any(parameter.dim() == 3 for parameter in base.model.parameters())  # experts


class _Graph:
    """One size: buffers, and the pass over them."""

    def __init__(self, graphs: DecodeGraphs, size: GraphSize) -> None:
        self._numbers, self._queries = graphs.make_buffers(size.num_tokens)
        self._nobody = (0, 0, graphs.trash_slot)  # in `numbers`
        self._image = graphs.make_tables(size)
        self.items = None if self._image is None else graphs.make_items(self._image, size)
        self.logits = self._numbers.new_empty(0)

        def compute() -> None:
            self.logits = graphs.forward(self._numbers, self._queries, self.items)

        self.replay = graphs.record(compute)

    def fill(self, step: DecodeStep, tables: RankTables | None) -> None:
        """Copies a step into the buffers; what it does not fill is nobody's."""
        num_tokens, block_size = len(step.token_ids), self._queries.block_size
        num_spare = self._numbers.shape[1] - num_tokens
        slots = [slot for sequence in step.sequences for slot in sequence.new_slots(block_size)]
        positions = [sequence.position for sequence in step.sequences]
        rows = zip((step.token_ids, positions, slots), self._nobody, strict=True)
        _copy(torch.tensor([[*row, *[nobody] * num_spare] for row, nobody in rows]), self._numbers)
        if step.late_ids is not None:
            self._numbers[0, :num_tokens].copy_(step.late_ids)
        singles = self._queries.singles
        width = max(len(sequence.blocks) for sequence in step.sequences)  # nobody reads behind a last block
        queries = make_query_tables(step.sequences, 1, width)
        _copy(functional.pad(queries.tiles, (0, 0, 0, num_spare)), singles.tiles)
        _copy(queries.blocks, singles.blocks[:num_tokens, :width])
        if self._image is not None and self.items is not None and tables is not None:
            self._image.fill(tables)
            self.items.begin_step()


def _copy(source: Tensor, buffer: Tensor) -> None:
    """From the host; pinned, so that nobody waits for it."""
    buffer.copy_(source.pin_memory() if buffer.is_cuda else source, non_blocking=True)


def _room(count: int) -> int:
    return num_lanes(count) if count else 0
