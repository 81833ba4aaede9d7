"""Paged attention against its definition: torch's operations in float64, the native kernel in its own types."""

from __future__ import annotations

import pytest
import torch
from paged_sequences import NATIVE_HEADS, expected_rows, make_sequences, with_sinks
from torch import Tensor

from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.paged_attention import (
    AttentionOptions,
    causal_mask,
    chunk_attention,
    decode_attention,
    reference_attention,
)
from fusionserve.kernels.paged_batch import PagedBatch, slots_of_blocks
from fusionserve.kernels.paged_sequence import PackedSequence

NUM_SLOTS = 200
KEY_DIM, VALUE_DIM = 8, 6
OPTIONS = {
    "plain": AttentionOptions(KEY_DIM**-0.5),
    "own scale": AttentionOptions(0.7),
    "window": AttentionOptions(KEY_DIM**-0.5, sliding_window=5),
    "window of one": AttentionOptions(KEY_DIM**-0.5, sliding_window=1),
    "softcap": AttentionOptions(0.7, softcap=1.5),
    "window and softcap": AttentionOptions(0.7, sliding_window=5, softcap=1.5),
}
HEADS = [(4, 4), (6, 2), (4, 1)]  # (query heads, KV heads)

with_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
with_heads = pytest.mark.parametrize(("num_heads", "num_kv_heads"), HEADS)


def make_cache(num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """Random keys [slots, kv_heads, dim] and values; every slot holds something, so a wrong one shows."""
    torch.manual_seed(0)
    keys = torch.randn(NUM_SLOTS, num_kv_heads, KEY_DIM, dtype=torch.float64)
    return keys, torch.randn(NUM_SLOTS, num_kv_heads, VALUE_DIM, dtype=torch.float64)


def draw_slots(*lengths: int) -> list[Tensor]:
    """Scattered slots for contexts of these lengths, no slot twice."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randperm(NUM_SLOTS, generator=generator)[: sum(lengths)].split(lengths))


@with_options
@with_heads
def test_decode_equals_reference(num_heads: int, num_kv_heads: int, options: AttentionOptions) -> None:
    lengths = (1, 4, 5, 6, 30)
    keys, values = make_cache(num_kv_heads)
    slots = draw_slots(*lengths)
    query = torch.randn(len(lengths), num_heads, KEY_DIM, dtype=torch.float64)
    padded = torch.stack([torch.cat([s, s[-1:].expand(max(lengths) - len(s))]) for s in slots])
    rows = [causal_mask(n - 1, 1, max(lengths), options.sliding_window) for n in lengths]
    output = decode_attention(query, keys, values, padded, torch.cat(rows), options)
    for index, here in enumerate(slots):
        expected = reference_attention(
            query[index : index + 1], keys[here], values[here], len(here) - 1, options
        )
        torch.testing.assert_close(output[index : index + 1], expected)


@with_options
@with_heads
@pytest.mark.parametrize("position", [0, 1, 13], ids="after {}".format)
def test_chunk_equals_reference(
    num_heads: int, num_kv_heads: int, options: AttentionOptions, position: int
) -> None:
    num_tokens = 9
    keys, values = make_cache(num_kv_heads)
    (slots,) = draw_slots(position + num_tokens)
    query = torch.randn(num_tokens, num_heads, KEY_DIM, dtype=torch.float64)
    mask = causal_mask(position, num_tokens, len(slots), options.sliding_window)
    output = chunk_attention(query, keys, values, slots, mask, options)
    expected = reference_attention(query, keys[slots], values[slots], position, options)
    torch.testing.assert_close(output, expected)


def test_sink_takes_a_share_of_the_softmax_and_gives_nothing() -> None:
    keys, values = make_cache(2)
    query = torch.randn(5, 4, KEY_DIM, dtype=torch.float64)
    options = with_sinks(OPTIONS["plain"], 4)
    found = reference_attention(query, keys[:5], values[:5], 0, options)
    scores = torch.einsum("thd,shd->ths", query, keys[:5].repeat_interleave(2, 1)) * KEY_DIM**-0.5
    powers = scores.exp().masked_fill(~causal_mask(0, 5, 5, None)[:, None], 0.0)
    shares = powers / (powers.sum(-1, keepdim=True) + options.sinks.double().exp()[:, None])
    torch.testing.assert_close(
        found, torch.einsum("ths,shd->thd", shares, values[:5].repeat_interleave(2, 1))
    )


@with_heads
@pytest.mark.parametrize("name", ["plain", "window and softcap"])
def test_sinks_in_torch_equal_reference(num_heads: int, num_kv_heads: int, name: str) -> None:
    options = with_sinks(OPTIONS[name], num_heads)
    keys, values = make_cache(num_kv_heads)
    (slots,) = draw_slots(22)
    query = torch.randn(9, num_heads, KEY_DIM, dtype=torch.float64)
    mask = causal_mask(13, 9, 22, options.sliding_window)
    expected = reference_attention(query, keys[slots], values[slots], 13, options)
    torch.testing.assert_close(chunk_attention(query, keys, values, slots, mask, options), expected)
    last = decode_attention(query[-1:], keys, values, slots[None], mask[-1:], options)
    torch.testing.assert_close(last, expected[-1:])


@pytest.mark.parametrize("name", ["plain", "softcap"])
def test_chunk_without_mask_is_causal(name: str) -> None:
    keys, values = make_cache(2)
    (slots,) = draw_slots(9)
    query = torch.randn(9, 6, KEY_DIM, dtype=torch.float64)
    output = chunk_attention(query, keys, values, slots, None, OPTIONS[name])
    torch.testing.assert_close(
        output, reference_attention(query, keys[slots], values[slots], 0, OPTIONS[name])
    )


def test_causal_mask_covers_the_window_up_to_the_token_itself() -> None:
    assert causal_mask(3, 2, 6, None).int().tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    assert causal_mask(3, 2, 6, 2).int().tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ERRORS = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}


DECODING = ((0, 1), (3, 1), (4, 1), (15, 1), (16, 1), (32, 1), (69, 1), (5, 1), (30, 1))
MIXED = ((0, 1), (0, 7), (69, 1), (13, 20), (16, 2))


@with_options
@pytest.mark.parametrize("heads", NATIVE_HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_size", [4, 16, 32])
@pytest.mark.parametrize("parts", [DECODING, DECODING[6:7], MIXED], ids=["many", "one", "chunks"])
def test_batch_equals_reference(
    parts: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int, int],
    options: AttentionOptions,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    check_batch(parts, heads, options, dtype, block_size)


@pytest.mark.parametrize("heads", NATIVE_HEADS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts", [DECODING, MIXED], ids=["many", "chunks"])
def test_batch_with_sinks_equals_reference(
    parts: tuple[tuple[int, int], ...], heads: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    check_batch(parts, heads, with_sinks(OPTIONS["window"], heads[0]), dtype, 16)


def check_batch(
    parts: tuple[tuple[int, int], ...],
    heads: tuple[int, int, int, int],
    options: AttentionOptions,
    dtype: torch.dtype,
    block_size: int,
) -> None:
    num_heads, num_kv_heads, dim, value_dim = heads
    sequences = make_sequences(parts, block_size)
    generator = torch.Generator().manual_seed(3)
    num_slots = block_size * sum(len(sequence.blocks) for sequence in sequences)
    keys = torch.randn(num_slots, num_kv_heads, dim, generator=generator).to(dtype)
    values = torch.randn(num_slots, num_kv_heads, value_dim, generator=generator).to(dtype)
    query = torch.randn(sequences[-1].end, num_heads, dim, generator=generator).to(dtype) * dim**-0.25
    output = PagedBatch(sequences, block_size, CPU).attend(query, LayerCache(keys, values), options)
    for sequence in sequences:
        slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, CPU)
        here = slice(sequence.start, sequence.end)
        expected = expected_rows(query[here], keys[slots], values[slots], sequence.position, options)
        torch.testing.assert_close(output[here].double(), expected, rtol=ERRORS[dtype], atol=ERRORS[dtype])


def test_slots_never_written_are_not_read_into_the_sum() -> None:
    """A request's last block may hold anything behind its own positions."""
    sequences = [PackedSequence(0, 1, 2, [0]), PackedSequence(1, 2, 19, [1, 2])]
    keys, values = torch.randn(48, 2, 64), torch.randn(48, 2, 64)
    for unwritten in (slice(3, 16), slice(36, 48)):
        keys[unwritten] = values[unwritten] = float("nan")
    output = PagedBatch(sequences, 16, CPU).attend(
        torch.randn(2, 4, 64), LayerCache(keys, values), OPTIONS["plain"]
    )
    assert output.isfinite().all()


@pytest.mark.skipif(native_library() is None, reason="torch spoils all of the chunk")
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 24])
def test_token_that_is_not_finite_spoils_no_block_before_its_own(dtype: torch.dtype, block_size: int) -> None:
    """Others find those blocks in the prefix cache."""
    position, bad = 3, 2 * block_size + 1
    (sequence,) = make_sequences(((position, 3 * block_size),), block_size)
    slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, CPU)
    keys, values = (torch.randn(4 * block_size, 2, 64).to(dtype) for _ in range(2))
    keys[slots[bad]] = values[slots[bad]] = float("nan")
    query = torch.randn(sequence.end, 6, 64).to(dtype)
    batch = PagedBatch([sequence], block_size, CPU)
    output = batch.attend(query, LayerCache(keys, values), OPTIONS["plain"])
    assert output[: 2 * block_size - position].isfinite().all()
    assert output[bad - position :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_token_gets_the_same_bits_however_its_prompt_is_cut(dtype: torch.dtype) -> None:
    blocks = [3, 0, 5, 1]
    keys, values = (torch.randn(96, 2, 64).to(dtype) for _ in range(2))
    cache, query = LayerCache(keys, values), torch.randn(60, 6, 64).to(dtype)

    def attend(*cuts: int) -> Tensor:
        ends = [*cuts, 60]
        rows = []
        for start, end in zip([0, *cuts], ends, strict=True):
            batch = PagedBatch([PackedSequence(0, end - start, start, blocks)], 16, CPU)
            rows.append(batch.attend(query[start:end].contiguous(), cache, OPTIONS["plain"]))
        return torch.cat(rows)

    assert torch.equal(attend(), attend(1, 2, 17, 40))
