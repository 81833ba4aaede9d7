"""Copies of an adapter's tensors that say how large the numbers are, on the calling thread alone.

Adapters load while the engine computes. An operation of torch on 32,768 elements or more wakes torch's own threads,
which then compete with the engine's for the same cores: beside a busy engine a load took seconds. Natively a copy is
one pass; with torch's operations, and for float16, it is done in pieces below that size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ctypes import CDLL, c_float, c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from fusionserve.kernels.native_call import SUFFIXES
from fusionserve.kernels.native_library import native_library

PIECE_ELEMENTS = 16_384

_ARGUMENTS = {
    "copy_measured": (c_void_p, c_void_p, c_int64),
    "transpose_measured": (c_void_p, c_void_p, c_int64, c_int64, c_float),
}


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
        return native(source.data_ptr(), target.data_ptr(), source.numel())
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
        return native(source.data_ptr(), target.data_ptr(), *source.shape, scale)
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


def _native(name: str, source: Tensor, target: Tensor) -> Callable[..., float] | None:
    library = native_library()
    return None if library is None else _declared(library, name, source.dtype, target.dtype)


@cache
def _declared(
    library: CDLL, name: str, source: torch.dtype, target: torch.dtype
) -> Callable[..., float] | None:
    """Declared once: a load calls it for every tensor, and most of them are small."""
    if not {source, target} <= SUFFIXES.keys():
        return None
    function = getattr(library, f"{name}_{SUFFIXES[source]}_{SUFFIXES[target]}")
    function.restype, function.argtypes = c_float, _ARGUMENTS[name]
    declared: Callable[..., float] = function
    return declared
