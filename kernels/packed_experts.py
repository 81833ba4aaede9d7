"""Routed experts whose weights lie packed as `packed_linear.py` has them; see `native/experts.cpp`.

y = sum over chosen e of w_e down_e(activation(gate_e x) * up_e x)
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusionserve.kernels.activations import Activation, reference_gated_product
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import PANEL
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.packed_linear import can_pack, pack, unpack


class _Experts(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("product", "gate_up", "down")),
        *((name, c_int64) for name in ("num_experts", "hidden", "inner", "activation")),
    )


class _Choices(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("experts", "weights")),
        *((name, c_int64) for name in ("num_tokens", "per_token")),
    )


def can_pack_experts(gate_up: Tensor, down: Tensor) -> bool:
    """True for weights [num_experts, 2 inner, hidden] and [num_experts, hidden, inner] that the kernel takes."""
    num_experts, hidden, inner = down.shape
    fits = gate_up.shape == (num_experts, 2 * inner, hidden) and hidden % PANEL == inner % PANEL == 0
    return fits and all(can_pack(weight.flatten(0, 1)) for weight in (gate_up, down))


class PackedExperts(nn.Module):
    """Stands in for transformers' experts whose weights are two parameters."""

    def __init__(
        self, gate_up: Tensor, down: Tensor, activation: Activation, pages: HugePages | None = None
    ) -> None:
        super().__init__()
        self.num_experts, self._hidden, self._inner = down.shape
        self._activation = activation
        self.gate_up, self.down = (
            nn.Parameter(pack(weight.flatten(0, 1), pages), requires_grad=False) for weight in (gate_up, down)
        )
        product: Any = native_function("packed_linear", down)
        assert product is not None, "packed without a native library"
        self._arguments = _Experts(
            ctypes.cast(product, c_void_p),
            self.gate_up.data_ptr(),
            self.down.data_ptr(),
            *(self.num_experts, self._hidden, self._inner, activation),
        )

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x [num_tokens, hidden]; chosen, experts' numbers, and weights [num_tokens, per_token] -> like x.

        A token has an expert at most once; a number that is no expert's stands for none.
        """
        native = native_function("experts", x)
        assert native is not None and x.dtype == self.down.dtype
        assert x.shape[1] == self._hidden and chosen.shape == weights.shape and len(chosen) == len(x)
        x, chosen, weights = x.contiguous(), chosen.long().contiguous(), weights.float().contiguous()
        y = torch.empty_like(x)
        choices = _Choices(chosen.data_ptr(), weights.data_ptr(), *chosen.shape)
        pointers = c_void_p(x.data_ptr()), c_void_p(y.data_ptr())
        native(ctypes.byref(self._arguments), ctypes.byref(choices), *pointers)
        return y

    def reference(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The definition, every expert for every token, in x's type."""
        gate_up = (
            unpack(self.gate_up, 2 * self._inner * self.num_experts)
            .view(self.num_experts, 2 * self._inner, self._hidden)
            .to(x.dtype)
        )
        down = (
            unpack(self.down, self._hidden * self.num_experts)
            .view(self.num_experts, self._hidden, self._inner)
            .to(x.dtype)
        )
        y = torch.zeros_like(x)
        for expert in range(self.num_experts):
            gate, up = functional.linear(x, gate_up[expert]).chunk(2, dim=-1)
            output = functional.linear(reference_gated_product(self._activation, gate, up), down[expert])
            y += output * (weights * (chosen == expert)).sum(-1, keepdim=True).to(x.dtype)
        return y
