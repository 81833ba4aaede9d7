"""Requests over a paged cache, as attention sees them."""

from __future__ import annotations

import torch

from fusionserve.kernels.paged_sequence import PackedSequence


def make_sequences(parts: tuple[tuple[int, int], ...], block_size: int) -> list[PackedSequence]:
    """(position, new tokens) of each; scattered blocks, no block twice."""
    sizes = [-(-(position + count) // block_size) for position, count in parts]
    blocks = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(2)).tolist()
    sequences, token, block = [], 0, 0
    for (position, count), size in zip(parts, sizes, strict=True):
        sequences.append(PackedSequence(token, token + count, position, blocks[block : block + size]))
        token, block = token + count, block + size
    return sequences
