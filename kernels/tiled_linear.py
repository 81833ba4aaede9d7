"""Linear modules with weights of 8 or 4 bits on a GPU; what they compute is defined in `quantized_linear.py`.

A line is what 32 bytes of an output hold: one group of inputs in 8 bits, two in 4 bits, whose levels share a byte, the
first group's in its lower half. The lines of the 16 outputs of a panel lie side by side, so that a tile of a product is
read in runs of 512 bytes, and the scales of a group do, too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.device.launches import few_bits_launches
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import LinearProduct, PanelLinear, num_panels
from fusionserve.kernels.native_call import NativeFunction
from fusionserve.kernels.quantized_linear import (
    GROUP,
    ROWS_AT_ONCE,
    QuantizedLinear,
    join_panels,
    levels_and_scales,
    side_by_side,
)


class TiledLinear(QuantizedLinear):
    """Stands in for an nn.Linear on a GPU; its weight in 8 or 4 bits. Make it with `quantize_on`.

    levels int8 [d_out / 16, lines, 16, 32], scales bfloat16 [d_out / 16, d_in / 32, 16].
    """

    @staticmethod
    def kernel_of(bits: int) -> str:
        """The product with weights of so many bits."""
        return f"tiled_int{bits}"

    def levels_of(self, panels: Tensor, outputs: Tensor) -> Tensor:
        """Levels [n, d_in / 32, 32] of outputs by their panels [n] and places in these [n]."""
        lines = self.levels[panels, :, outputs]  # [n, lines, 32]
        if self.bits == 8:
            return lines
        halves = torch.stack(((lines << 4) >> 4, lines >> 4), dim=2)  # int8: the sign comes down
        return halves.flatten(1, 2)[:, : self.in_features // GROUP]

    @staticmethod
    def product(modules: Sequence[PanelLinear]) -> LinearProduct:
        """The product of modules of this kind that share an input."""
        return TiledProduct(modules)


class TiledProduct(LinearProduct):
    """The product of one input with the weights of several modules in one launch, or two."""

    def __init__(self, modules: Sequence[PanelLinear]) -> None:
        super().__init__(modules)
        self._weights = few_bits_launches().FewBitsWeights.of(modules)

    def native(self, like: Tensor) -> NativeFunction | None:
        """None: it is none."""
        return None

    def compute(self, x: Tensor, outputs: Sequence[Tensor], *, add: bool) -> None:
        """Writes each module's W x + b to its output [..., d_out], or adds it."""
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        few_bits_launches().multiply(x.reshape(-1, x.shape[-1]).contiguous(), self._weights, flat, add=add)


@torch.no_grad()
def quantize_on(device: torch.device, weight: Tensor, bias: Tensor | None, bits: int) -> TiledLinear:
    """weight [d_out, d_in] of any device in 8 or 4 bits on `device`; `can_quantize` must hold.

    The full weight is not on `device` as a whole unless it was there.
    """
    parts = (
        _to_lines(*levels_and_scales(rows.to(device), bits), bits)
        for rows in torch.split(weight, ROWS_AT_ONCE)
    )
    levels, scales = join_panels(parts, num_panels(len(weight)), HugePages())
    own_bias = None if bias is None else bias.to(device)
    return TiledLinear(levels, scales, own_bias, out_features=len(weight), bits=bits, dtype=weight.dtype)


def _to_lines(levels: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if bits == 4:
        levels = functional.pad(levels, (0, 0, 0, levels.shape[1] % 2))
        levels = (levels[:, 0::2] & 15) | (levels[:, 1::2] << 4)
    return side_by_side(levels), side_by_side(scales[..., None]).squeeze(-1)
