"""Linear modules whose weights lie packed for a native product in their own type; see `native/linear.cpp`."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import PANEL, PanelLinear, num_panels
from fusionserve.kernels.native_library import native_library

# Inputs whose weights lie together: what the processor's product of bfloat16 pairs takes.
_RUNS = {torch.bfloat16: 2, torch.float16: 1, torch.float32: 1}


def can_pack(weight: Tensor) -> bool:
    """True for a weight [d_out, d_in] that the packed product takes, on a processor that has it."""
    library = native_library()
    return (
        library is not None
        and weight.device.type == "cpu"
        and weight.dtype in _RUNS
        and weight.shape[1] % _RUNS[weight.dtype] == 0
        and bool(library.has_packed_linear())
    )


def pack(weight: Tensor, pages: HugePages | None = None) -> Tensor:
    """[d_out, d_in] -> panels of 16 outputs, each run of inputs together: [d_out / 16, d_in / run, 16, run].

    The last panel is filled up with zeros. In these pages, or in some of its own.
    """
    (d_out, d_in), run = weight.shape, _RUNS[weight.dtype]
    whole = d_out // PANEL * PANEL
    packed = (pages or HugePages()).zeros(weight, num_panels(d_out), d_in // run, PANEL, run)
    packed[: whole // PANEL] = _by_runs(weight[:whole], run)
    if whole < d_out:
        packed[-1] = _by_runs(functional.pad(weight[whole:], (0, 0, 0, whole + PANEL - d_out)), run)[0]
    return packed


def _by_runs(weight: Tensor, run: int) -> Tensor:
    d_out, d_in = weight.shape
    return weight.reshape(d_out // PANEL, PANEL, d_in // run, run).transpose(1, 2)


def unpack(packed: Tensor, d_out: int) -> Tensor:
    """The weight [d_out, d_in] again."""
    num_panels, num_runs, _, run = packed.shape
    return packed.transpose(1, 2).reshape(num_panels * PANEL, num_runs * run)[:d_out]


class PackedLinear(PanelLinear):
    """Stands in for an nn.Linear of this weight [d_out, d_in], packed in these pages or in some of its own."""

    kernel = "packed_linear"

    def __init__(self, weight: Tensor, bias: Tensor | None, pages: HugePages | None = None) -> None:
        d_out, d_in = weight.shape
        super().__init__(d_in, d_out, bias)
        packed = pack(weight, pages)
        self.packed = nn.Parameter(packed, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [d_out, d_in]."""
        return unpack(self.packed, self.out_features)

    def rows(self, ids: Tensor) -> Tensor:
        """The weights [n, d_in] of the outputs ids [n]."""
        ids = ids.contiguous()
        assert ids.dtype == torch.long
        rows = self.packed.new_empty(len(ids), self.in_features)
        library = native_library()
        assert library is not None, "packed without a native library"
        pointers = [c_void_p(tensor.data_ptr()) for tensor in (self.packed, ids, rows)]
        num_runs, run_bytes = self.packed.shape[1], self.packed.shape[3] * self.packed.itemsize
        unpack_rows = getattr(library, f"unpack_rows_{run_bytes}")
        unpack_rows(*pointers[:2], c_int64(len(ids)), c_int64(num_runs), pointers[2])
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
