"""Rank rows as the processor multiplies them in pairs; see `native/rank_panels.h` for how they lie.

A resident's rows have as many rows of a module's tensors to themselves, and are laid out in them as a whole.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from fusionserve.kernels.linear_product import PANEL
from fusionserve.kernels.native_library import native_library


def has_panels(d_in: int, like: Tensor) -> bool:
    """True if modules with so many inputs have their rank rows in panels, in the type and on the device of `like`."""
    return like.dtype == torch.bfloat16 and like.device.type == "cpu" and _has_panels(d_in)


@cache
def _has_panels(d_in: int) -> bool:
    library = native_library()
    return library is not None and bool(library.has_rank_panels(c_int64(d_in)))


def padded_shapes(capacity: int, d_in: int, d_out: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of shrink and expand for so many rows in panels: of whole panels, with rows behind the last that may be read."""
    library = native_library()
    assert library is not None, "panels without a native library"
    num_spare = int(library.num_spare_rank_numbers())
    widths = d_in, -(-d_out // PANEL) * PANEL
    shrink, expand = ((capacity + -(-num_spare // width), width) for width in widths)
    return shrink, expand


def pack_rows_(shrink: Tensor, expand: Tensor, shrink_rows: Tensor, expand_rows: Tensor) -> None:
    """Lays out a resident's rows, shrink [rows, d_in] and expand [rows, d_out], in its part of the pool, in place.

    shrink_rows [rows, d_in], expand_rows [rows, d_out in whole panels]; an even number of rows.
    """
    library = native_library()
    assert library is not None, "panels without a native library"
    num_rows, width = expand_rows.shape
    assert num_rows % 2 == 0 and shrink.shape == shrink_rows.shape and len(expand) == num_rows
    if expand.shape[1] < width:
        expand = torch.nn.functional.pad(expand, (0, width - expand.shape[1]))
    for source, target, pack in (
        (shrink, shrink_rows, library.pack_shrink_rows),
        (expand, expand_rows, library.pack_expand_rows),
    ):
        assert source.dtype == target.dtype == torch.bfloat16 and target.is_contiguous()
        source = source.contiguous()
        size = c_int64(num_rows), c_int64(source.shape[1])
        pack(c_void_p(source.data_ptr()), *size, c_void_p(target.data_ptr()))
