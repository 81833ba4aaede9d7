"""Rank rows as the processor multiplies them in pairs; see `native/rank_panels.h` for how they lie.

A resident's rows have as many rows of a module's tensors to themselves, and are laid out in them as a whole.
"""

from __future__ import annotations

from ctypes import c_int64
from functools import cache

import torch
from torch import Tensor

from fusionserve.kernels.linear_product import PANEL
from fusionserve.kernels.native_library import native_library

_NUMBER_BYTES = torch.bfloat16.itemsize
_ENTRY_NUMBERS = 7


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


class Packing:
    """Rows of many modules that are laid out in the pool in one call, which threads share."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []  # what `run` reads
        self._entries: list[int] = []  # as `native/rank_panels.cpp` has them

    def add(
        self,
        rows: tuple[Tensor, Tensor] | None,
        shrink_rows: Tensor,
        expand_rows: Tensor,
        start: int,
        num_rows: int,
    ) -> None:
        """Has shrink [num_rows, d_in] and expand [num_rows, d_out] of a resident put from `start` on, zeros for None.

        shrink_rows [capacity, d_in], expand_rows [capacity, d_out in whole panels]; an even number of rows. Nobody may
        write to any of them before `run`.
        """
        d_in, width = shrink_rows.shape[1], expand_rows.shape[1]
        assert num_rows % 2 == 0 and shrink_rows.dtype == expand_rows.dtype == torch.bfloat16
        assert shrink_rows.is_contiguous() and expand_rows.is_contiguous()
        assert start >= 0 and start + num_rows <= min(shrink_rows.shape[0], expand_rows.shape[0])
        sources, d_out = (0, 0), width
        if rows is not None:
            shrink, expand = rows
            d_out = expand.shape[1]
            assert shrink.dtype == expand.dtype == torch.bfloat16 and shrink.shape == (num_rows, d_in)
            assert expand.shape[0] == num_rows and 0 <= width - d_out < PANEL
            assert shrink.is_contiguous() and expand.is_contiguous()
            sources = shrink.data_ptr(), expand.data_ptr()
            self._kept.append(rows)
        self._entries += (
            *sources,
            shrink_rows.data_ptr() + start * d_in * _NUMBER_BYTES,
            expand_rows.data_ptr() + start * width * _NUMBER_BYTES,
            num_rows,
            d_in,
            d_out,
        )

    def run(self) -> None:
        """Lays all of them out."""
        if not self._entries:
            return
        library = native_library()
        assert library is not None, "panels without a native library"
        entries = (c_int64 * len(self._entries))(*self._entries)
        library.pack_rank_rows(entries, c_int64(len(entries) // _ENTRY_NUMBERS))
        self._kept.clear()
        self._entries.clear()
