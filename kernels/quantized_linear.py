"""Linear modules with weights of 8 or 4 bits and inputs brought to 8 bits; see `native/quantized_linear.cpp`.

    w = s l      levels l = -127 .. 127, or -8 .. 7; a scale s, in bfloat16, for each 32 inputs of an output
    x = t k      levels k = -127 .. 127; a scale t, in float32, for each 32 inputs of a token

The formats are those of GGUF's Q8_0 and Q4_0 but for the type of the scales. What a token gets does not depend on its
company. Without native products of bytes (AVX-512 VNNI or AVX2) the same is computed in float64, many times slower.
`tiled_linear.py` is the same for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import PANEL, PanelLinear, num_panels
from fusionserve.kernels.native_library import native_library

GROUP = 32  # inputs that share a scale
LEAST = 1e-30  # a group of inputs with nothing as large is zeros: 127 / largest would overflow
_FOUR = 4  # inputs that the processor multiplies at once
ROWS_AT_ONCE = 1024  # outputs, so that quantizing a large head takes little memory


def can_quantize(weight: Tensor) -> bool:
    """True for a weight [d_out, d_in] whose inputs divide into groups."""
    return weight.shape[1] % GROUP == 0


def has_quantized_product() -> bool:
    """True on a processor with products of bytes; elsewhere `QuantizedLinear` computes in float64."""
    library = native_library()
    return library is not None and bool(library.has_quantized_linear())


class QuantizedLinear(PanelLinear):
    """Stands in for an nn.Linear; its weight in 8 or 4 bits. Make it with `quantize`."""

    def __init__(
        self,
        levels: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        *,
        out_features: int,
        bits: int,
        dtype: torch.dtype,
    ) -> None:
        """levels uint8 [d_out / 16, d_in / 32, bits, 16, 4], scales bfloat16 [d_out / 16, d_in / 32, 16].

        The last panel may be filled up with zeros. `dtype` is that of the weight that was quantized.
        """
        assert len(scales) == num_panels(out_features)
        super().__init__(scales.shape[1] * GROUP, out_features, bias)
        self.bits = bits
        self.kernel = self.kernel_of(bits)
        self.levels = nn.Parameter(levels, requires_grad=False)
        self.scales = nn.Parameter(scales, requires_grad=False)
        self._dtype = dtype

    @staticmethod
    def kernel_of(bits: int) -> str | None:
        """The product with weights of so many bits."""
        return f"int{bits}_linear" if has_quantized_product() else None

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [d_out, d_in] that is computed with."""
        return torch.cat([self.rows(ids) for ids in self._row_ids()])

    @property
    def largest_step(self) -> float:
        """What a weight may be off by at most: half a step of the levels, a whole one at the end of the scale."""
        return float(self.scales.abs().max())

    def rows(self, ids: Tensor) -> Tensor:
        """The weights [n, d_in] of the outputs ids [n], rounded to the type of the weight that was quantized."""
        return self._exact_rows(ids).to(self._dtype)

    def _exact_rows(self, ids: Tensor) -> Tensor:
        panels, outputs = ids // PANEL, ids % PANEL
        scales = self.scales[panels, :, outputs]
        return (self.levels_of(panels, outputs) * scales.float()[..., None]).flatten(1)

    def levels_of(self, panels: Tensor, outputs: Tensor) -> Tensor:
        """Levels [n, d_in / 32, 32] of outputs by their panels [n] and places in these [n]."""
        levels = self.levels[panels, :, :, outputs].to(torch.int16)  # [n, groups, bits, 4]
        if self.bits == 4:
            levels = torch.stack((levels & 15, levels >> 4), dim=-2)
        return levels.flatten(2) - (1 << self.bits - 1)

    def storage(self) -> tuple[Tensor, Tensor]:
        """Levels and scales."""
        return self.levels, self.scales

    def reference(self, x: Tensor) -> Tensor:
        """The definition in float64, rounded to x's type: so the company in a batch does not show in the last digit."""
        wide = in_eight_bits(x).double()
        parts = [functional.linear(wide, self._exact_rows(ids).double()) for ids in self._row_ids()]
        y = torch.cat(parts, dim=-1)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _row_ids(self) -> tuple[Tensor, ...]:
        """All outputs, some at a time."""
        return torch.split(torch.arange(self.out_features, device=self.levels.device), ROWS_AT_ONCE)


@torch.no_grad()
def quantize(
    weight: Tensor, bias: Tensor | None, bits: int, pages: HugePages | None = None
) -> QuantizedLinear:
    """weight [d_out, d_in] in 8 or 4 bits, in these pages or in some of its own; `can_quantize` must hold."""
    parts = (_to_panels(*levels_and_scales(rows, bits), bits) for rows in torch.split(weight, ROWS_AT_ONCE))
    levels, scales = join_panels(parts, num_panels(len(weight)), pages or HugePages())
    return QuantizedLinear(levels, scales, bias, out_features=len(weight), bits=bits, dtype=weight.dtype)


def join_panels(
    parts: Iterator[tuple[Tensor, Tensor]], num_panels: int, pages: HugePages
) -> tuple[Tensor, Tensor]:
    """Levels and scales of all panels, put where they stay as soon as those of some outputs are there."""
    part = next(parts)
    levels, scales = (pages.zeros(some, num_panels, *some.shape[1:]) for some in part)
    start = 0
    for some_levels, some_scales in chain([part], parts):
        end = start + len(some_levels)
        levels[start:end], scales[start:end] = some_levels, some_scales
        start = end
    return levels, scales


def in_eight_bits(x: Tensor) -> Tensor:
    """x [..., d_in] as the product sees it, in float32: whole steps of 1/127 of the largest number of each group."""
    groups = x.float().view(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    largest = groups.abs().amax(-1, keepdim=True)
    steps = torch.full_like(largest, 127.0) / largest  # 127 / tensor would be 127 times a rounded reciprocal
    levels = torch.where(largest >= LEAST, (groups * steps).round(), 0.0)
    return (levels * (largest / torch.full_like(largest, 127.0))).flatten(-2)  # likewise, on a GPU


def levels_and_scales(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Levels int8 [n, d_in / 32, 32] and scales bfloat16 [n, d_in / 32] of some outputs' weights [n, d_in]."""
    groups = weight.float().reshape(len(weight), -1, GROUP)
    scales = _scales(groups, bits).bfloat16()
    middle = 1 << bits - 1
    lowest = -middle if bits == 4 else 1 - middle
    levels = torch.where(scales != 0, (groups / scales.float()).round(), 0.0).clamp(lowest, middle - 1)
    return levels.to(torch.int8), scales.squeeze(-1)


def _scales(groups: Tensor, bits: int) -> Tensor:
    """[n, groups, 1]. In 4 bits the number furthest from zero becomes -8, so that all 16 levels are used."""
    if bits == 8:
        return groups.abs().amax(-1, keepdim=True) / 127
    furthest = groups.abs().argmax(-1, keepdim=True)
    return groups.gather(-1, furthest) / -8


def _to_panels(levels: Tensor, scales: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Without a sign, fours of inputs together, and in 4 bits two fours in one."""
    unsigned = (levels.to(torch.int16) + (1 << bits - 1)).to(torch.uint8)
    fours = unsigned.view(*levels.shape[:2], -1, _FOUR)  # [n, groups, 8, 4]
    if bits == 4:
        fours = fours[:, :, 0::2] | fours[:, :, 1::2] << 4
    return side_by_side(fours), side_by_side(scales[..., None]).squeeze(-1)


def side_by_side(rows: Tensor) -> Tensor:
    """[n, groups, ...] -> [n / 16, groups, ..., 16, the last of ...]: the 16 outputs of a panel side by side.

    Zeros fill up the last panel.
    """
    missing = num_panels(len(rows)) * PANEL - len(rows)
    if missing:
        rows = torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])
    return rows.view(-1, PANEL, *rows.shape[1:]).movedim(1, -2).contiguous()
