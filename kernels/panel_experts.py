"""Routed experts whose weights lie in panels, packed or in few bits; see `native/experts.cpp`.

y = sum over chosen e of w_e down_e(activation(gate_e x) * up_e x)
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from fusionserve.kernels.activations import Activation, reference_gated_product
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import PANEL, PanelLinear
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.packed_linear import PackedLinear, can_pack
from fusionserve.kernels.quantized_linear import can_quantize, has_quantized_product, quantize


class _Experts(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("product", "gate_up", "gate_up_scales", "down", "down_scales")),
        *((name, c_int64) for name in ("num_experts", "hidden", "inner", "bits", "activation")),
    )


class _Choices(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("experts", "weights")),
        *((name, c_int64) for name in ("num_tokens", "per_token")),
    )


def can_be_in_panels(gate_up: Tensor, down: Tensor, bits: int | None) -> bool:
    """True for weights [num_experts, 2 inner, hidden] and [num_experts, hidden, inner] that the kernel takes.

    `bits` are 8 or 4, or None for weights that stay as they are.
    """
    num_experts, hidden, inner = down.shape
    fits = gate_up.shape == (num_experts, 2 * inner, hidden) and hidden % PANEL == inner % PANEL == 0
    flat = gate_up.flatten(0, 1), down.flatten(0, 1)
    if bits is None:
        return fits and all(map(can_pack, flat))
    return fits and has_quantized_product() and all(map(can_quantize, flat))


class PanelExperts(nn.Module):
    """Stands in for transformers' experts whose weights are two parameters. `can_be_in_panels` must hold of them."""

    def __init__(
        self,
        gate_up: Tensor,
        down: Tensor,
        activation: Activation,
        bits: int | None = None,
        pages: HugePages | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self._hidden, self._inner = down.shape
        self._activation, self._dtype = activation, down.dtype
        self.gate_up, self.down = (_to_panels(weight, bits, pages) for weight in (gate_up, down))
        assert self.gate_up.kernel is not None
        product: Any = native_function(self.gate_up.kernel, down)
        assert product is not None, "in panels without a native library"
        tensors = (*self.gate_up.storage(), *self.down.storage())
        self._arguments = _Experts(
            ctypes.cast(product, c_void_p),
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
            *(self.num_experts, self._hidden, self._inner, bits or 8 * down.itemsize, activation),
        )

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [num_tokens, hidden]; chosen, experts' numbers, and weights [num_tokens, per_token] -> like x.

        A token has an expert at most once; a number that is no expert's stands for none.
        """
        native = native_function("experts", x)
        assert native is not None and x.dtype == self._dtype
        assert x.shape[1] == self._hidden and chosen.shape == weights.shape and len(chosen) == len(x)
        x, chosen, weights = x.contiguous(), chosen.long().contiguous(), weights.float().contiguous()
        y = torch.empty_like(x)
        choices = _Choices(chosen.data_ptr(), weights.data_ptr(), *chosen.shape)
        pointers = c_void_p(x.data_ptr()), c_void_p(y.data_ptr())
        native(ctypes.byref(self._arguments), ctypes.byref(choices), *pointers)
        return y

    def reference(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The definition, every expert for every token, rounded to x's type after every operation."""
        pairs = self.gate_up.reference(x).view(len(x), self.num_experts, 2, self._inner)
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            gated = reference_gated_product(self._activation, *pairs[:, expert].unbind(1))
            output = self.down.reference(gated).view(len(x), self.num_experts, -1)[:, expert]
            y += output * (weights * (chosen == expert)).sum(-1, keepdim=True).to(x.dtype)
        return y


def _to_panels(weight: Tensor, bits: int | None, pages: HugePages | None) -> PanelLinear:
    """Of [num_experts, d_out, d_in], the experts' outputs one behind the other."""
    flat = weight.flatten(0, 1)
    return PackedLinear(flat, None, pages) if bits is None else quantize(flat, None, bits, pages)
