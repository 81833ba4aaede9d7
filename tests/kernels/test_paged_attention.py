"""Paged attention against its definition, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.paged_attention import (
    AttentionOptions,
    causal_mask,
    chunk_attention,
    decode_attention,
    reference_attention,
)

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
