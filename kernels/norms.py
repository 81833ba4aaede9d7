"""The norms of a decoder, of rows.

    RMSNorm    y = x / sqrt(mean(x^2) + eps) * w                     Zhang and Sennrich 2019, arXiv:1910.07467
    LayerNorm  y = (x - mean(x)) / sqrt(var(x) + eps) * w + b        Ba et al. 2016, arXiv:1607.06450

In Triton on a GPU; natively where there is a library that takes the type; else with torch's operations.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from fusionserve.kernels.device.launches import pointwise_launches
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.native_call import native_function


@dataclass(frozen=True, slots=True)
class RMSNorm:
    """The weight [width] and epsilon of an RMSNorm.

    A weight of x's type multiplies what is rounded to that type already, as in Llama; one in float32 multiplies before
    anything is rounded, as in Gemma and OLMo 2.
    """

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """The weight and bias [width], both float32, and epsilon of a LayerNorm, which is rounded once."""

    weight: Tensor
    bias: Tensor
    epsilon: float

    def __post_init__(self) -> None:
        assert self.weight.dtype == self.bias.dtype == torch.float32 and self.bias.shape == self.weight.shape


Norm = RMSNorm | LayerNorm


class NativeNorm(ctypes.Structure):
    """A norm as the kernels take it; its tensors must outlive it."""

    _fields_ = (
        *((name, c_void_p) for name in ("weight", "bias")),
        *((name, c_int64) for name in ("width", "is_wide")),
        ("epsilon", c_float),
    )

    @classmethod
    def of(cls, norm: Norm | None, dtype: torch.dtype) -> NativeNorm:
        """For numbers of `dtype`; None: there is no norm."""
        if norm is None:
            return cls(None, None, 0, False, 0.0)
        weight, bias = norm.weight, norm.bias if isinstance(norm, LayerNorm) else None
        assert weight.dim() == 1 and weight.is_contiguous() and weight.dtype in (dtype, torch.float32)
        assert bias is None or bias.is_contiguous()
        pointers = weight.data_ptr(), None if bias is None else bias.data_ptr()
        return cls(*pointers, len(weight), weight.dtype != dtype, norm.epsilon)


def normalize(x: Tensor, norm: Norm) -> Tensor:
    """x [..., width] -> like x."""
    if uses_triton(x.device):
        bias = norm.bias if isinstance(norm, LayerNorm) else None
        normalized: Tensor = pointwise_launches().normalize(x.contiguous(), norm.weight, bias, norm.epsilon)
        return normalized
    native = native_function("normalize", x)
    if native is None:
        return reference_normalize(x, norm)
    x = x.contiguous()
    assert norm.weight.shape == x.shape[-1:]
    y = torch.empty_like(x)
    parameters = NativeNorm.of(norm, x.dtype)
    native(c_void_p(x.data_ptr()), ctypes.byref(parameters), c_void_p(y.data_ptr()), c_int64(x.numel()))
    return y


def reference_normalize(x: Tensor, norm: Norm) -> Tensor:
    """The definitions, in float32."""
    wide = x.float()
    if isinstance(norm, LayerNorm):
        wide = wide - wide.mean(-1, keepdim=True)
    normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.epsilon)
    y = norm.weight * normalized.to(norm.weight.dtype)
    return (y + norm.bias if isinstance(norm, LayerNorm) else y).to(x.dtype)
