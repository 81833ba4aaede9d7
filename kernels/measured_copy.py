"""Copies of an adapter's tensors that say how large the numbers are, on the calling thread alone.

Adapters load while the engine computes. An operation of torch on 32,768 elements or more wakes torch's own threads,
which then compete with the engine's for the same cores: beside a busy engine a load took seconds. Natively a copy is
one pass; with torch's operations, and for float16, it is done in pieces below that size.
"""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from fusionserve.kernels.native_call import SUFFIXES
from fusionserve.kernels.native_library import native_library

PIECE_ELEMENTS = 16_384


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Flat views of a contiguous tensor, in order."""
    yield from torch.split(tensor.view(-1), PIECE_ELEMENTS)


def copy_measured(target: Tensor, source: Tensor) -> float:
    """target = source, in the target's dtype; both contiguous and of one size.

    Returns the largest magnitude in the target, NaN if a number is not finite; 0 for an empty one.
    """
    assert target.is_contiguous() and source.is_contiguous() and target.numel() == source.numel()
    native = _native("copy_measured", source, target)
    if native is not None:
        return _measured(native, source, target, c_int64(source.numel()))
    for ours, theirs in zip(pieces(target), pieces(source), strict=True):
        ours.copy_(theirs)
    return largest_magnitude(target)


def transpose_measured(target: Tensor, source: Tensor, scale: float) -> float:
    """target [columns, rows] = scale * source^T for source [rows, columns], computed in float32; both contiguous.

    Returns the largest magnitude in the target, as `copy_measured` does.
    """
    assert target.is_contiguous() and source.is_contiguous() and target.shape == source.T.shape
    native = _native("transpose_measured", source, target)
    if native is not None:
        return _measured(native, source, target, *map(c_int64, source.shape), c_float(scale))
    num_rows = max(1, PIECE_ELEMENTS // source.shape[1])
    for start in range(0, source.shape[0], num_rows):
        piece = source[start : start + num_rows].float() * scale
        target[:, start : start + num_rows] = piece.T
    return largest_magnitude(target)


def largest_magnitude(tensor: Tensor) -> float:
    """max |x| of a contiguous tensor, NaN if a number is not finite; 0 for an empty one."""
    largest = [piece.abs().max() for piece in pieces(tensor) if piece.numel()]
    found = float(torch.stack(largest).max()) if largest else 0.0
    return found + found * 0.0


def _native(name: str, source: Tensor, target: Tensor) -> Any | None:
    library = native_library()
    if library is None or not {source.dtype, target.dtype} <= SUFFIXES.keys():
        return None
    return getattr(library, f"{name}_{SUFFIXES[source.dtype]}_{SUFFIXES[target.dtype]}")


def _measured(native: Any, source: Tensor, target: Tensor, *sizes: object) -> float:
    native.restype = c_float
    largest: float = native(c_void_p(source.data_ptr()), c_void_p(target.data_ptr()), *sizes)
    return largest
