"""Attention in Triton, in its interpreter without a GPU, against the definition in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device_kernels import DEVICE
from paged_sequences import make_sequences, with_sinks
from torch import Tensor

from fusionserve.kernels.device.paged_launch import (
    DeviceBatch,
    DeviceQueries,
    QueryTables,
    attend_,
    chunk_tokens,
    make_query_tables,
)
from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.paged_attention import AttentionOptions, reference_attention
from fusionserve.kernels.paged_batch import slots_of_blocks
from fusionserve.kernels.paged_sequence import PackedSequence

pytestmark = pytest.mark.gpu

OPTIONS = {
    "plain": AttentionOptions(0.2),
    "window": AttentionOptions(0.2, sliding_window=5),
    "window of one": AttentionOptions(0.2, sliding_window=1),
    "softcap": AttentionOptions(0.7, softcap=1.5),
    "window and softcap": AttentionOptions(0.7, sliding_window=70, softcap=1.5),
}
KINDS = [*((options, torch.float32) for options in OPTIONS.values()), (OPTIONS["plain"], torch.bfloat16)]
# (query heads, KV heads, dim, value dim)
HEADS = [(9, 3, 64, 64), (5, 5, 24, 20), (20, 1, 40, 40)]
# A GPU computes each with each; interpreted, every shape is seen plain, and every kind with one shape.
CASES = [
    (heads, *kind)
    for heads in HEADS
    for kind in KINDS
    if DEVICE.type == "cuda" or heads == HEADS[1] or kind == KINDS[0]
]
SINGLES = ((3, 1), (15, 1), (300, 1))
CHUNKS = ((0, 20), (69, 2), (13, 17))


def attended(
    sequences: list[PackedSequence], heads: tuple[int, int, int, int], dtype: torch.dtype, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; of slots never written NaN."""
    num_heads, num_kv_heads, dim, value_dim = heads
    generator = torch.Generator().manual_seed(3)
    num_slots = block_size * sum(len(sequence.blocks) for sequence in sequences)
    query = torch.randn(sequences[-1].end, num_heads, dim, generator=generator).to(DEVICE, dtype)
    keys = torch.full((num_slots, num_kv_heads, dim), float("nan"), dtype=dtype, device=DEVICE)
    values = keys.new_full((num_slots, num_kv_heads, value_dim), float("nan"))
    for sequence in sequences:
        slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, DEVICE)
        for cache in (keys, values):
            cache[slots] = torch.randn(len(slots), *cache.shape[1:], generator=generator).to(DEVICE, dtype)
    return query, keys, values


@pytest.mark.parametrize(("heads", "options", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("parts", [SINGLES, CHUNKS], ids=["singles", "chunks"])
def test_attention_equals_reference(
    parts: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int, int],
    options: AttentionOptions,
    dtype: torch.dtype,
) -> None:
    check_attention(parts, heads, options, dtype)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("parts", [SINGLES, CHUNKS], ids=["singles", "chunks"])
def test_attention_with_sinks_equals_reference(
    parts: tuple[tuple[int, int], ...], heads: tuple[int, int, int, int]
) -> None:
    options = with_sinks(OPTIONS["window"], heads[0])
    assert options.sinks is not None
    check_attention(parts, heads, replace(options, sinks=options.sinks.to(DEVICE)), torch.float32)


def check_attention(
    parts: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int, int],
    options: AttentionOptions,
    dtype: torch.dtype,
) -> None:
    block_size = 16 if parts is SINGLES else 4
    sequences = make_sequences(parts, block_size)
    query, keys, values = attended(sequences, heads, dtype, block_size)
    per_tile = 1 if parts is SINGLES else chunk_tokens(heads[0], heads[1])
    tables = make_query_tables(sequences, per_tile, max(len(s.blocks) for s in sequences) + 2)
    output = query.new_full((len(query), heads[0], heads[3]), float("nan"))
    attend_(query, keys, values, tables.to(DEVICE), block_size, options, output)
    for sequence in sequences:
        slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, DEVICE)
        here = slice(sequence.start, sequence.end)
        wide = [tensor.double() for tensor in (query[here], keys[slots], values[slots])]
        expected = reference_attention(*wide, sequence.position, options)
        error = 2**-6 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(output[here].double(), expected, rtol=error, atol=error)


def test_single_token_gets_the_same_bits_in_any_company() -> None:
    sequences = make_sequences(SINGLES, 16)
    query, keys, values = attended(sequences, (4, 2, 16, 16), torch.float32, 16)
    together = torch.empty(len(query), 4, 16, device=DEVICE)
    attend_(
        query, keys, values, make_query_tables(sequences, 1, 40).to(DEVICE), 16, OPTIONS["plain"], together
    )
    for index, own in enumerate(sequences):
        alone = torch.empty(1, 4, 16, device=DEVICE)
        tables = make_query_tables([PackedSequence(0, 1, own.position, own.blocks)], 1, 40).to(DEVICE)
        attend_(query[index : index + 1], keys, values, tables, 16, OPTIONS["plain"], alone)
        assert torch.equal(alone[0], together[index])


def test_single_tokens_beside_prompts_take_scratch_for_themselves_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sequences = make_sequences(((0, 60), (3, 1), (40, 1)), 16)
    query, keys, values = attended(sequences, (4, 2, 16, 16), torch.float32, 16)
    output, taken, empty = torch.empty_like(query), [], torch.empty

    def count(*shape: int, **options: object) -> Tensor:
        taken.append(empty(*shape, **options))
        return taken[-1]

    monkeypatch.setattr(torch, "empty", count)
    tables = make_query_tables(sequences[1:], 1, 4).to(DEVICE)
    attend_(query, keys, values, tables, 16, OPTIONS["plain"], output)
    assert sum(tensor.nbytes for tensor in taken) == 8 * 2 * 4 * (16 + 2) * 4


def test_tokens_in_no_tile_are_left_as_they_are() -> None:
    sequences = make_sequences(((5, 1),), 16)
    query, keys, values = attended(sequences, (4, 2, 16, 16), torch.float32, 16)
    tables = make_query_tables(sequences, 1, 4)
    tables.tiles[:] = 0
    output = torch.full((1, 4, 16), 7.0, device=DEVICE)
    attend_(query, keys, values, tables.to(DEVICE), 16, OPTIONS["plain"], output)
    assert (output == 7.0).all()


def test_rows_of_nobody_are_cleared_once_for_all_layers() -> None:
    sequences = make_sequences(((5, 1),), 16)
    query, *layer = attended(sequences, (4, 2, 16, 16), torch.float32, 16)
    singles = make_query_tables(sequences, 1, 4).to(DEVICE)
    nothing = QueryTables(singles.tiles[:0], singles.blocks[:0], 1)
    batch = DeviceBatch(DeviceQueries(singles, nothing, 16), torch.zeros(2, dtype=torch.long, device=DEVICE))
    query = query.expand(2, -1, -1).contiguous()
    first = batch.attend(query, LayerCache(*layer), OPTIONS["plain"]).clone()
    second = batch.attend(query, LayerCache(*(-each for each in layer)), OPTIONS["plain"])
    again = batch.attend(query, LayerCache(*layer), OPTIONS["plain"])
    assert second.data_ptr() == again.data_ptr()
    assert torch.equal(again, first) and again[0].any() and not again[1].any()
