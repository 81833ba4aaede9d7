"""Copies of an adapter's tensors that say how large the numbers are, on the calling thread alone.

Adapters load while the engine computes. An operation of torch on 32,768 elements or more wakes torch's own threads,
which then compete with the engine's for the same cores: beside a busy engine a load took seconds. And whoever holds the
interpreter lock keeps the engine from its next step. So many copies are one native call, without the lock, and each is
one pass over its tensor; with torch's operations they are done in pieces below that size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library

PIECE_ELEMENTS = 16_384

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in `native/measured_copy.cpp`


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """target [num_columns, num_rows] = scale * source^T for source [num_rows, num_columns], computed in float32.

    With one column the numbers stay in their order. `source` and `target` count bytes from the beginning of the memory
    that is copied from, and to.
    """

    source: int
    target: int
    source_dtype: torch.dtype
    target_dtype: torch.dtype
    num_rows: int
    num_columns: int = 1
    scale: float = 1.0

    @property
    def size(self) -> int:
        """Numbers that are copied."""
        return self.num_rows * self.num_columns

    @property
    def source_end(self) -> int:
        """The byte behind its source."""
        return self.source + self.size * self.source_dtype.itemsize

    @property
    def target_end(self) -> int:
        """The byte behind its target."""
        return self.target + self.size * self.target_dtype.itemsize


class MeasuredCopies:
    """Copies from one piece of memory to another, to be made any number of times."""

    def __init__(self, copies: Sequence[Copy]) -> None:
        self._copies = tuple(copies)
        entries = [number for copy in copies for number in _to_entry(copy)]
        self._entries = (c_int64 * len(entries))(*entries)
        self._scales = (c_float * len(copies))(*(copy.scale for copy in copies))
        self._source_bytes = max((copy.source_end for copy in copies), default=0)
        self._target_bytes = max((copy.target_end for copy in copies), default=0)

    def run(self, source: Tensor, target: Tensor) -> list[float]:
        """Makes them, between two pieces of memory, uint8, on the host.

        Returns the largest magnitude in each target, NaN if a number is not finite, 0 if it is empty.
        """
        assert (
            source.dtype == target.dtype == torch.uint8 and source.is_contiguous() and target.is_contiguous()
        )
        assert self._source_bytes <= len(source) and self._target_bytes <= len(target)
        library, count = native_library(), len(self._copies)
        if library is None:
            return [_copy(copy, source, target) for copy in self._copies]
        largest = (c_float * count)()
        pointers = c_void_p(source.data_ptr()), c_void_p(target.data_ptr())
        library.copy_measured(self._entries, self._scales, c_int64(count), *pointers, largest)
        return list(largest)


def copy_measured(target: Tensor, source: Tensor) -> float:
    """target = source, in the target's dtype, and what is largest in it; both contiguous, of one size, on the host."""
    assert target.is_contiguous() and source.is_contiguous() and target.numel() == source.numel()
    copy = Copy(
        source=0,
        target=0,
        source_dtype=source.dtype,
        target_dtype=target.dtype,
        num_rows=source.numel(),
    )
    (largest,) = MeasuredCopies([copy]).run(
        *(tensor.view(-1).view(torch.uint8) for tensor in (source, target))
    )
    return largest


def _to_entry(copy: Copy) -> tuple[int, ...]:
    types = len(_TYPES) * _TYPES[copy.source_dtype] + _TYPES[copy.target_dtype]
    return copy.source, copy.target, copy.num_rows, copy.num_columns, types


def _copy(copy: Copy, source: Tensor, target: Tensor) -> float:
    rows = source[copy.source : copy.source_end].view(copy.source_dtype).view(copy.num_rows, copy.num_columns)
    written = target[copy.target : copy.target_end].view(copy.target_dtype)
    columns = written.view(copy.num_columns, copy.num_rows)
    height = max(1, PIECE_ELEMENTS // copy.num_columns)
    for start in range(0, copy.num_rows, height):
        piece = rows[start : start + height].float() * copy.scale
        columns[:, start : start + height] = piece.T
    return largest_magnitude(written)


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of a contiguous tensor, in order."""
    yield from torch.split(tensor.view(-1), PIECE_ELEMENTS)


def largest_magnitude(tensor: Tensor) -> float:
    """max |x| of a contiguous tensor, NaN if a number is not finite; 0 for an empty one."""
    largest = [piece.abs().max() for piece in pieces(tensor) if piece.numel()]
    found = float(torch.stack(largest).max()) if largest else 0.0
    return found + found * 0.0
