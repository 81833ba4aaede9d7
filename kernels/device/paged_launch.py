"""A step's queries over the paged cache: the tables of their tiles, and the launches of the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusionserve.kernels.device.paged_kernels import attend_kernel, combine_kernel
from fusionserve.kernels.device.triton_use import dot_in_float32, num_lanes
from fusionserve.kernels.host_copy import sent
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_sequence import PackedSequence

_LEAST_ROWS = 16  # of a product on tensor cores
_CHUNK_ROWS = 64  # query rows of a tile of a prompt, tokens by heads
_BLOCK_N = 32  # positions taken at once
_SINGLE_SPLITS = 8  # programs that share a single token's context


@dataclass(frozen=True, slots=True)
class QueryTables:
    """Tiles [num_tiles, 4] of the kernel's head and the blocks [requests, width] they refer to, int32.

    A tile of no tokens is passed over, so that the tables may be larger than what they hold.
    """

    tiles: Tensor
    blocks: Tensor
    tokens_per_tile: int  # at most

    def to(self, device: torch.device) -> QueryTables:
        """The same on a device."""
        return QueryTables(sent(self.tiles, device), sent(self.blocks, device), self.tokens_per_tile)


def chunk_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Tokens of a tile of a prompt."""
    return max(1, _CHUNK_ROWS // num_lanes(num_heads // num_kv_heads))


def make_query_tables(
    sequences: Sequence[PackedSequence], tokens_per_tile: int, table_width: int
) -> QueryTables:
    """Tables on the CPU."""
    tiles = [
        (token, min(tokens_per_tile, s.end - token), s.position + token - s.start, row)
        for row, s in enumerate(sequences)
        for token in range(s.start, s.end, tokens_per_tile)
    ]
    blocks = torch.zeros(len(sequences), table_width, dtype=torch.int32)
    rows = blocks.numpy()  # which takes lists as they are; every step would pay for a tensor of each
    for row, sequence in enumerate(sequences):
        rows[row, : len(sequence.blocks)] = sequence.blocks
    return QueryTables(torch.tensor(tiles, dtype=torch.int32).view(-1, 4), blocks, tokens_per_tile)


@dataclass(frozen=True, slots=True)
class DeviceQueries:
    """The queries of a step: requests with one new token, and chunks."""

    singles: QueryTables
    chunks: QueryTables
    block_size: int

    @classmethod
    def make(
        cls,
        singles: Sequence[PackedSequence],
        chunks: Sequence[PackedSequence],
        block_size: int,
        heads: tuple[int, int],
    ) -> DeviceQueries:
        """Tables on the CPU for so many query heads and key-value heads."""
        width = max((len(sequence.blocks) for sequence in (*singles, *chunks)), default=1)
        tables = make_query_tables(singles, 1, width), make_query_tables(chunks, chunk_tokens(*heads), width)
        return cls(*tables, block_size)

    def to(self, device: torch.device) -> DeviceQueries:
        """The same on a device."""
        return DeviceQueries(self.singles.to(device), self.chunks.to(device), self.block_size)

    def attend_(
        self, query: Tensor, keys: Tensor, values: Tensor, options: AttentionOptions, output: Tensor
    ) -> None:
        """As `attend_` below."""
        for tables in (self.singles, self.chunks):
            attend_(query, keys, values, tables, self.block_size, options, output)


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """Queries and the slots [num_tokens] of the new tokens, all on the device: stands in for a `PagedBatch`."""

    queries: DeviceQueries
    new_slots: Tensor
    _outputs: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, cache: LayerCache, options: AttentionOptions) -> Tensor:
        """query [num_tokens, heads, dim] over one layer's cache -> [num_tokens, heads, value_dim], zeros for nobody.

        In memory that the next layer overwrites, so that the pass clears the rows of nobody once.
        """
        heads = query.shape[1], cache.values.shape[-1]
        if heads not in self._outputs:
            self._outputs[heads] = query.new_zeros(len(query), *heads)
        output = self._outputs[heads]
        self.queries.attend_(query, cache.keys, cache.values, options, output)
        return output


def attend_(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: QueryTables,
    block_size: int,
    options: AttentionOptions,
    output: Tensor,
) -> None:
    """output [num_tokens, heads, value_dim] of the tokens in the tables, for query [num_tokens, heads, dim].

    keys and values [num_slots, kv_heads, dim] have those of the new tokens; everything is contiguous.
    """
    for tensor in (query, keys, values, output):
        assert tensor.is_contiguous() and tensor.dtype is query.dtype
    _, num_heads, dim = query.shape
    num_kv_heads, value_dim = values.shape[1:]
    assert num_heads % num_kv_heads == 0 and keys.shape == (len(values), num_kv_heads, dim)
    if not len(tables.tiles):
        return
    splits = _SINGLE_SPLITS if tables.tokens_per_tile == 1 else 1
    places = splits, len(tables.tiles) * tables.tokens_per_tile, num_heads
    parts = torch.empty(*places, value_dim, dtype=torch.float32, device=query.device)
    statistics = torch.empty(*places, 2, dtype=torch.float32, device=query.device)
    attend_kernel[(len(tables.tiles), num_kv_heads, splits)](
        query,
        keys,
        values,
        parts,
        statistics,
        tables.tiles,
        tables.blocks,
        statistics if options.sinks is None else options.sinks,
        tables.blocks.shape[1],
        num_kv_heads,
        options.sliding_window or 0,
        options.softmax_scale,
        options.softcap or 0.0,
        HEADS_PER_KV=num_heads // num_kv_heads,
        TOKENS=tables.tokens_per_tile,
        GROUP=max(num_lanes(num_heads // num_kv_heads), _LEAST_ROWS // tables.tokens_per_tile),
        DIM=dim,
        VALUE_DIM=value_dim,
        DIM_LANES=num_lanes(dim, _LEAST_ROWS),
        VALUE_LANES=num_lanes(value_dim, _LEAST_ROWS),
        BLOCK_SIZE=block_size,
        BLOCK_N=_BLOCK_N,
        SPLITS=splits,
        HAS_SOFTCAP=options.softcap is not None,
        HAS_SINKS=options.sinks is not None,
        WIDE_DOT=dot_in_float32(query),
    )
    combine_kernel[(len(tables.tiles), tables.tokens_per_tile)](
        parts,
        statistics,
        output,
        tables.tiles,
        num_heads,
        VALUE_DIM=value_dim,
        VALUE_LANES=num_lanes(value_dim),
        HEAD_LANES=num_lanes(num_heads),
        SPLITS=splits,
    )
