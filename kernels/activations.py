"""What stands between the products of an MLP: y = f(x), or with a gate y = f(g) * u.

In Triton on a GPU; natively where there is a library that takes the type; else with torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ctypes import c_int64, c_void_p
from enum import IntEnum

import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.device.launches import pointwise_launches
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.native_call import native_function


class Activation(IntEnum):
    """An activation, by the number that the kernels know it by."""

    SILU = 0
    GELU_TANH = 1  # by its tanh formula
    GELU = 2
    RELU = 3
    RELU_SQUARED = 4


_DEFINITIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.GELU: functional.gelu,
    Activation.RELU: functional.relu,
    Activation.RELU_SQUARED: lambda x: functional.relu(x).square(),
}


def gated_product(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape -> activation(gate) * up."""
    if uses_triton(gate.device):
        product: Tensor = pointwise_launches().gated_product(activation, gate.contiguous(), up.contiguous())
        return product
    native = native_function("gated_product", gate)
    if native is None:
        return reference_gated_product(activation, gate, up)
    assert up.shape == gate.shape and up.dtype == gate.dtype
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    pointers = (c_void_p(tensor.data_ptr()) for tensor in (gate, up, y))
    native(c_int64(activation), *pointers, c_int64(gate.numel()))
    return y


def reference_gated_product(activation: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """The definition."""
    return _DEFINITIONS[activation](gate) * up


def activate(activation: Activation, x: Tensor) -> Tensor:
    """activation(x), which may be in x's memory."""
    native = native_function("activate", x)
    if native is None or not x.is_contiguous():
        return reference_activate(activation, x)
    native(c_int64(activation), c_void_p(x.data_ptr()), c_int64(x.numel()))
    return x


def reference_activate(activation: Activation, x: Tensor) -> Tensor:
    """The definition. One operation of torch's for most, on a GPU too."""
    return _DEFINITIONS[activation](x)
