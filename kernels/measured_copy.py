"""Copies of an adapter's tensors that say how large the numbers are, on the calling thread alone.

Adapters load while the engine computes. An operation of torch on 32,768 elements or more wakes torch's own threads,
which then compete with the engine's for the same cores: beside a busy engine a load took seconds. And whoever holds the
interpreter lock keeps the engine from its next step. So many copies are one native call, without the lock, and each is
one pass over its tensor; with torch's operations they are done in pieces below that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import CDLL, c_float, c_int64

import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library

PIECE_ELEMENTS = 16_384

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in `native/measured_copy.cpp`
_Copy = tuple[Tensor, Tensor, int, float]  # target, source, columns of the source, scale


class MeasuredCopies:
    """Copies that are collected with `copy` and `transpose`, and made by `run`.

    All tensors are contiguous and in the host's memory; nobody else may write to them before `run`.
    """

    def __init__(self) -> None:
        self._copies: list[_Copy] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        """target = source, in the target's dtype; both of one size."""
        self._add(target, source, 1, 1.0)

    def transpose(self, target: Tensor, source: Tensor, scale: float) -> None:
        """target [columns, rows] = scale * source^T for source [rows, columns], computed in float32."""
        assert target.shape == source.shape[::-1]
        self._add(target, source, source.shape[1], scale)

    def _add(self, target: Tensor, source: Tensor, num_columns: int, scale: float) -> None:
        assert target.is_contiguous() and source.is_contiguous() and target.numel() == source.numel()
        self._copies.append((target, source, num_columns, scale))

    def run(self) -> list[float]:
        """Makes them; returns the largest magnitude in each target, NaN if a number is not finite, 0 if it is empty."""
        copies, self._copies = self._copies, []
        library = native_library()
        return [_copy(*copy) for copy in copies] if library is None else _copy_natively(library, copies)


def _copy_natively(library: CDLL, copies: Sequence[_Copy]) -> list[float]:
    entries: list[int] = []
    for target, source, num_columns, _ in copies:
        num_rows = source.numel() // num_columns
        types = len(_TYPES) * _TYPES[source.dtype] + _TYPES[target.dtype]
        entries += (source.data_ptr(), target.data_ptr(), num_rows, num_columns, types)
    count = len(copies)
    scales, largest = (c_float * count)(*(copy[-1] for copy in copies)), (c_float * count)()
    library.copy_measured((c_int64 * len(entries))(*entries), scales, c_int64(count), largest)
    return list(largest)


def _copy(target: Tensor, source: Tensor, num_columns: int, scale: float) -> float:
    rows, columns = source.view(-1, num_columns), target.view(num_columns, -1)
    height = max(1, PIECE_ELEMENTS // num_columns)
    for start in range(0, len(rows), height):
        piece = rows[start : start + height].float() * scale
        columns[:, start : start + height] = piece.T
    return largest_magnitude(target)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of a contiguous tensor, in order."""
    yield from torch.split(tensor.view(-1), PIECE_ELEMENTS)


def largest_magnitude(tensor: Tensor) -> float:
    """max |x| of a contiguous tensor, NaN if a number is not finite; 0 for an empty one."""
    largest = [piece.abs().max() for piece in pieces(tensor) if piece.numel()]
    found = float(torch.stack(largest).max()) if largest else 0.0
    return found + found * 0.0
