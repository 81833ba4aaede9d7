"""Requests over a paged cache, as attention sees them."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fusionserve.kernels.paged_attention import AttentionOptions, causal_mask, chunk_attention
from fusionserve.kernels.paged_sequence import PackedSequence

# (query heads, KV heads, dim, value dim): groups of 1 to 7, dims that are and are not whole registers
NATIVE_HEADS = [
    (4, 4, 64, 64),
    (9, 3, 64, 64),
    (14, 2, 32, 128),
    (5, 5, 24, 20),
    (8, 1, 80, 96),
    (6, 2, 256, 256),
]


def make_sequences(parts: tuple[tuple[int, int], ...], block_size: int) -> list[PackedSequence]:
    """(position, new tokens) of each; scattered blocks, no block twice."""
    sizes = [-(-(position + count) // block_size) for position, count in parts]
    blocks = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(2)).tolist()
    sequences, token, block = [], 0, 0
    for (position, count), size in zip(parts, sizes, strict=True):
        sequences.append(PackedSequence(token, token + count, position, blocks[block : block + size]))
        token, block = token + count, block + size
    return sequences


def with_sinks(options: AttentionOptions, num_heads: int) -> AttentionOptions:
    """Small and large ones; one takes nearly all, and two take nothing, one of which is not finite in powers of two."""
    sinks = torch.linspace(-3, 3, num_heads)
    sinks[0] = 60.0
    if num_heads > 3:
        sinks[-2:] = torch.tensor([-math.inf, torch.finfo(torch.bfloat16).min])
    return replace(options, sinks=sinks)


def expected_rows(
    query: Tensor, keys: Tensor, values: Tensor, position: int, options: AttentionOptions
) -> Tensor:
    """The definition in float64, by torch's own operation: thousands of cases, and the loops are slow."""
    mask = causal_mask(position, len(query), len(keys), options.sliding_window)
    slots = torch.arange(len(keys))
    return chunk_attention(query.double(), keys.double(), values.double(), slots, mask, options)
