"""Rank rows for tests of the kernels that meet them."""

from __future__ import annotations

from collections.abc import Iterable

from fusionserve.kernels.rank_panels import Packing, has_panels, padded_shapes
from fusionserve.kernels.segments import PartRows


def as_kernels_take(rows: PartRows, residents: Iterable[tuple[int, int]]) -> PartRows:
    """The same rows, in panels if the processor has them so: `residents` are their first rows and numbers."""
    (capacity, d_in), d_out = rows.shrink.shape, rows.expand.shape[1]
    if not has_panels(d_in, rows.shrink):
        return rows
    shrink, expand = map(rows.shrink.new_zeros, padded_shapes(capacity, d_in, d_out))
    packing = Packing()
    for start, extent in residents:
        here = slice(start, start + extent)
        plain = rows.shrink[here].contiguous(), rows.expand[here].contiguous()
        packing.add(plain, shrink, expand, start, extent)
    packing.run()
    return PartRows(shrink, rows.bias, expand[:, :d_out], in_panels=True)
