"""Linear modules whose bfloat16 weights lie packed for the processor's pairwise product; see `native/linear.cpp`."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import PANEL, PanelLinear
from fusionserve.kernels.native_library import native_library


def can_pack(weight: Tensor) -> bool:
    """True for a weight [d_out, d_in] that the packed product takes, on a processor that has it."""
    library = native_library()
    return (
        library is not None
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[0] % PANEL == 0
        and weight.shape[1] % 2 == 0
        and bool(library.has_packed_linear())
    )


def pack(weight: Tensor, pages: HugePages | None = None) -> Tensor:
    """[d_out, d_in] -> panels of 16 outputs, each pair of inputs together: [d_out / 16, d_in / 2, 16, 2].

    In these pages, or in some of its own.
    """
    d_out, d_in = weight.shape
    return (pages or HugePages()).copy(weight.reshape(d_out // PANEL, PANEL, d_in // 2, 2).transpose(1, 2))


def unpack(packed: Tensor) -> Tensor:
    """The weight [d_out, d_in] again."""
    num_panels, num_pairs = packed.shape[:2]
    return packed.transpose(1, 2).reshape(num_panels * PANEL, num_pairs * 2)


class PackedLinear(PanelLinear):
    """Stands in for an nn.Linear in bfloat16."""

    kernel = "packed_linear"

    def __init__(self, packed: Tensor, bias: Tensor | None) -> None:
        super().__init__(packed.shape[1] * 2, packed.shape[0] * PANEL, bias)
        self.packed = nn.Parameter(packed, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [d_out, d_in]."""
        return unpack(self.packed)

    def rows(self, ids: Tensor) -> Tensor:
        """The weights [n, d_in] of the outputs ids [n]."""
        ids = ids.contiguous()
        assert ids.dtype == torch.long
        rows = self.packed.new_empty(len(ids), self.in_features)
        library = native_library()
        assert library is not None, "packed without a native library"
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (self.packed, ids, rows)]
        library.unpack_rows(*pointers[:2], c_int64(len(ids)), c_int64(self.in_features), pointers[2])
        return rows

    def storage(self) -> tuple[Tensor, None]:
        """The packed weight; there are no scales."""
        return self.packed, None

    def reference(self, x: Tensor) -> Tensor:
        """The definition in float32, rounded to x's type."""
        return reference_linear(x, self.weight, self.bias).to(x.dtype)


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition in float32; the oracle of the packed product."""
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
