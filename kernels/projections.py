"""Modules that share an input: their base's product and what adapters add to it, in one pass over the outputs.

Tile registers add rank rows to sums that are not rounded yet; elsewhere they are added to outputs. See
`native/projections.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from typing import Any

from torch import Tensor

from fusionserve.kernels.linear_product import LinearProduct, NativePart
from fusionserve.kernels.native_call import Tokens, native_function
from fusionserve.kernels.segments import Additions, NativeAddition, Segments


class NativeProjections(ctypes.Structure):
    """A group as the kernels take it."""

    _fields_ = (
        ("product", c_void_p),
        ("parts", ctypes.POINTER(NativePart)),
        ("num_parts", c_int64),
        ("additions", ctypes.POINTER(NativeAddition)),
        ("num_additions", c_int64),
    )

    @classmethod
    def of(cls, product: LinearProduct, like: Tensor) -> NativeProjections:
        """A group that adapters add nothing to so far; `product` must outlive it."""
        kernel: Any = product.native(like)
        return cls(ctypes.cast(kernel, c_void_p), product.parts, len(product.parts), None, 0)

    def set_additions(self, additions: Additions) -> None:
        """What adapters add from now on; it must outlive the group."""
        self.additions, self.num_additions = additions.array, len(additions.array)


def project(
    product: LinearProduct,
    x: Tensor,
    outputs: Sequence[Tensor],
    additions: Additions,
    segments: Segments,
    *,
    add: bool,
) -> None:
    """Writes W x + b and what the segments add to each output [..., d_out], or adds all of it; natively."""
    native = native_function("project", x)
    assert native is not None, "projections need the native kernel"
    x = product.aim(x, outputs, add=add)
    segments.check(x, additions, [y.view(len(x), -1) for y in outputs])
    group = NativeProjections.of(product, x)
    group.set_additions(additions)
    size = c_int64(len(segments.array))
    native(ctypes.byref(group), ctypes.byref(Tokens.of(x)), segments.array, size)
