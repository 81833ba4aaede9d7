"""A cache of tiles against one of plain slots: what is stored, what is attended to, and what others left behind."""

from __future__ import annotations

import pytest
import torch
from paged_sequences import NATIVE_HEADS, expected_rows, make_sequences, with_sinks
from torch import Tensor

from fusionserve.kernels.layer_cache import LayerCache, can_tile
from fusionserve.kernels.paged_attention import AttentionOptions
from fusionserve.kernels.paged_batch import PagedBatch, slots_of_blocks
from fusionserve.kernels.paged_sequence import PackedSequence
from fusionserve.kernels.rotation import Angles, Rotation, rotate_and_store

CPU = torch.device("cpu")
LIKE = torch.empty(0, dtype=torch.bfloat16)
TILE = 16
ROUNDING = 2**-7
OPTIONS = {
    "plain": AttentionOptions(0.2),
    "window": AttentionOptions(0.2, sliding_window=21),
    "softcap": AttentionOptions(0.2, softcap=1.5),
}
HEADS = [*NATIVE_HEADS, (34, 2, 64, 48)]  # and more queries than registers take at once
DECODING = ((0, 1), (3, 1), (15, 1), (16, 1), (69, 1), (30, 1), (64, 1), (130, 1))
MIXED = ((0, 1), (0, 7), (69, 1), (13, 20), (16, 2), (47, 40))

pytestmark = pytest.mark.skipif(
    not can_tile(LIKE, TILE, 64, 64), reason="no cache is tiled on this processor"
)


def untiled(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """The keys and values [num_slots, kv_heads, dim] of a cache of tiles."""
    (num_slots, heads, dim), value_dim = cache.keys.shape, cache.values.shape[2]
    keys = cache.keys.view(num_slots // TILE, heads, dim // 2, TILE, 2).permute(0, 3, 1, 2, 4)
    values = cache.values.view(num_slots // TILE, heads, TILE // 2, value_dim, 2).permute(0, 2, 4, 1, 3)
    return keys.reshape(num_slots, heads, dim), values.reshape(num_slots, heads, value_dim)


def used_before(num_slots: int, num_kv_heads: int, dim: int, value_dim: int) -> LayerCache:
    """A cache in which somebody left what is not a number."""
    shapes = (num_slots, num_kv_heads, dim), (num_slots, num_kv_heads, value_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=LIKE.dtype) for shape in shapes)
    return LayerCache(keys, values, is_tiled=True)


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(LIKE.dtype)


def store_in_steps(cache: LayerCache, slots: Tensor, key: Tensor, value: Tensor, *sizes: int) -> None:
    """Chunks of these sizes, and the rest one by one."""
    start = 0
    for size in [*sizes, *[1] * len(slots)]:
        here = slice(start, min(start + size, len(slots)))
        cache.store_(slots[here], key[here], value[here])
        start = here.stop


@pytest.mark.parametrize("sizes", [(45,), (7, 9, 20), (16, 16, 13), (1, 1, 30), (40,)], ids=str)
def test_what_is_stored_is_there_with_zeros_behind_it(sizes: tuple[int, ...]) -> None:
    cache = used_before(96, 3, 24, 20)
    slots = slots_of_blocks([4, 0, 2], 45, TILE, CPU)
    key, value = make(45, 3, 24, seed=1), make(45, 3, 20, seed=2)
    store_in_steps(cache, slots, key, value, *sizes)
    keys, values = untiled(cache)
    assert torch.equal(keys[slots], key) and torch.equal(values[slots], value)
    behind = torch.arange(2 * TILE + 13, 3 * TILE)
    assert not keys[behind].any() and not values[behind].any()
    untouched = torch.tensor(
        [slot for block in (1, 3, 5) for slot in range(block * TILE, (block + 1) * TILE)]
    )
    assert keys[untouched].isnan().all() and values[untouched].isnan().all()


def test_requests_side_by_side_are_stored_at_once() -> None:
    """Tokens of several requests in one call, some at the beginning of a tile, some within one."""
    cache = used_before(96, 2, 64, 64)
    before = slots_of_blocks([3], 5, TILE, CPU)
    cache.store_(before, make(5, 2, 64), make(5, 2, 64))
    slots = torch.cat([before[-1:] + 1, slots_of_blocks([0, 1], 20, TILE, CPU), torch.tensor([64])])
    key, value = make(22, 2, 64, seed=3), make(22, 2, 64, seed=4)
    cache.store_(slots, key, value)
    keys, values = untiled(cache)
    assert torch.equal(keys[slots], key) and torch.equal(values[slots], value)
    for behind in (slice(20, 32), slice(54, 64), slice(65, 80)):
        assert not keys[behind].any() and not values[behind].any()


@pytest.mark.parametrize("num_tokens", [1, 45, 400])
@pytest.mark.parametrize("by_neighbours", [False, True])
def test_turned_keys_are_those_of_a_plain_cache(by_neighbours: bool, num_tokens: int) -> None:
    query, key, value = (make(num_tokens, heads, 32, seed=heads) for heads in (6, 2, 3))
    value = value[:, :2].contiguous()
    angles = torch.randn(num_tokens, 32)
    slots = slots_of_blocks(list(range(26)), num_tokens, TILE, CPU)
    rotation = Rotation(Angles(angles.cos(), angles.sin(), by_neighbours), slots)
    plain = LayerCache(torch.zeros(416, 2, 32, dtype=LIKE.dtype), torch.zeros(416, 2, 32, dtype=LIKE.dtype))
    tiled = used_before(416, 2, 32, 32)
    turned = [rotate_and_store(query.clone(), key, value, cache, rotation) for cache in (plain, tiled)]
    assert torch.equal(*turned)
    keys, values = untiled(tiled)
    assert torch.equal(keys[slots], plain.keys[slots]) and torch.equal(values[slots], plain.values[slots])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("parts", [DECODING, DECODING[4:5], MIXED], ids=["many", "one", "chunks"])
def test_attention_over_tiles_equals_the_definition(
    parts: tuple[tuple[int, int], ...],
    block_size: int,
    heads: tuple[int, int, int, int],
    options: AttentionOptions,
) -> None:
    check_attention(parts, block_size, heads, options)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("parts", [DECODING, MIXED], ids=["many", "chunks"])
def test_attention_with_sinks_over_tiles_equals_the_definition(
    parts: tuple[tuple[int, int], ...], name: str, heads: tuple[int, int, int, int]
) -> None:
    check_attention(parts, 16, heads, with_sinks(OPTIONS[name], heads[0]))


def check_attention(
    parts: tuple[tuple[int, int], ...],
    block_size: int,
    heads: tuple[int, int, int, int],
    options: AttentionOptions,
) -> None:
    num_heads, num_kv_heads, dim, value_dim = heads
    sequences = make_sequences(parts, block_size)
    num_slots = block_size * sum(len(sequence.blocks) for sequence in sequences)
    cache = used_before(num_slots, num_kv_heads, dim, value_dim)
    for sequence in sequences:
        slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, CPU)
        sizes = (len(slots), num_kv_heads)
        store_in_steps(cache, slots, make(*sizes, dim, seed=5), make(*sizes, value_dim, seed=6), 9, 24, 32)
    query = make(sequences[-1].end, num_heads, dim, seed=7)
    output = PagedBatch(sequences, block_size, CPU).attend(query, cache, options)
    keys, values = untiled(cache)
    for sequence in sequences:
        slots = slots_of_blocks(sequence.blocks, sequence.length, block_size, CPU)
        here = slice(sequence.start, sequence.end)
        expected = expected_rows(query[here], keys[slots], values[slots], sequence.position, options)
        torch.testing.assert_close(output[here].double(), expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("largest_scores", [(0, 400), (400, 0), (0, 8), (300, 300)], ids=str)
@pytest.mark.parametrize("num_new", [1, 40])
def test_scores_may_grow_from_stretch_to_stretch(num_new: int, largest_scores: tuple[int, int]) -> None:
    """By more than the sums so far can keep, by less, and down to weights of nothing."""
    length, blocks = 290, list(range(19))
    cache, slots = used_before(304, 2, 64, 64), slots_of_blocks(blocks, length, TILE, CPU)
    ramp = (
        torch.linspace(*largest_scores, length)[:, None, None] / 8
    )  # a query's numbers are about 1, there are 64
    key, value = (make(length, 2, 64, seed=11).abs() * ramp / 2).to(LIKE.dtype), make(length, 2, 64, seed=12)
    cache.store_(slots, key, value)
    query = make(num_new, 6, 64, seed=13).abs()
    batch = PagedBatch([PackedSequence(0, num_new, length - num_new, blocks)], TILE, CPU)
    output = batch.attend(query, cache, OPTIONS["plain"])
    expected = expected_rows(query, key, value, length - num_new, OPTIONS["plain"])
    torch.testing.assert_close(output.double(), expected, rtol=ROUNDING, atol=ROUNDING)


def test_token_gets_the_same_bits_however_its_prompt_is_cut() -> None:
    blocks, outputs = [3, 0, 5, 1], []
    key, value, query = make(60, 2, 64, seed=8), make(60, 2, 64, seed=9), make(60, 6, 64, seed=10)
    slots = slots_of_blocks(blocks, 60, TILE, CPU)
    for sizes in ((60,), (1, 1, 15, 23, 20)):
        cache, rows, start = used_before(96, 2, 64, 64), [], 0
        for size in sizes:
            here = slice(start, start + size)
            cache.store_(slots[here], key[here], value[here])
            batch = PagedBatch([PackedSequence(0, size, start, blocks)], TILE, CPU)
            rows.append(batch.attend(query[here].contiguous(), cache, OPTIONS["plain"]))
            start += size
        outputs.append(torch.cat(rows))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("like", "block_size", "key_dim"),
    [(torch.empty(0), 16, 64), (LIKE, 8, 64), (LIKE, 24, 64), (LIKE, 16, 63), (LIKE, 16, 512)],
    ids=["float32", "half a tile", "a tile and a half", "odd", "wide"],
)
def test_what_cannot_be_tiled_is_plain(like: Tensor, block_size: int, key_dim: int) -> None:
    assert not can_tile(like, block_size, key_dim, 64)
