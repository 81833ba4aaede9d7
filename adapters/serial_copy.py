"""Element-wise work on large tensors, done in pieces that torch does not spread over threads.

Adapters load while the engine computes. An operation of 32,768 elements or more wakes torch's own threads, which then
compete with the engine's for the same cores: beside a busy engine a load of 0.07 s took 2 s.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_ELEMENTS = 16_384


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of a contiguous tensor, in order."""
    yield from torch.split(tensor.view(-1), PIECE_ELEMENTS)


def copy_into(target: Tensor, source: Tensor) -> None:
    """target = source, in the target's dtype; both contiguous and of one size."""
    for ours, theirs in zip(pieces(target), pieces(source), strict=True):
        ours.copy_(theirs)


def scale_transposed_into(target: Tensor, source: Tensor, scale: float) -> None:
    """target [columns, rows] = scale * source^T for source [rows, columns], computed in float32."""
    num_rows = max(1, PIECE_ELEMENTS // source.shape[1])
    for start in range(0, source.shape[0], num_rows):
        piece = source[start : start + num_rows].float() * scale
        target[:, start : start + num_rows] = piece.T


def largest_magnitude(tensor: Tensor) -> float:
    """max |x|, or NaN if there is one; 0 for an empty tensor."""
    largest = [piece.abs().max() for piece in pieces(tensor) if piece.numel()]
    return float(torch.stack(largest).max()) if largest else 0.0
