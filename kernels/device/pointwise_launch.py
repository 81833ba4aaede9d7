"""The launches of the pointwise kernels; contiguous tensors of one type, as `pointwise.py` has them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusionserve.kernels.device.pointwise_kernels import (
    gated_product_kernel,
    rms_norm_kernel,
    rotate_and_store_kernel,
)
from fusionserve.kernels.device.triton_use import num_lanes, num_programs

_BLOCK = 1024


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x [..., width], weight [width] -> like x."""
    assert x.is_contiguous() and weight.is_contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    if x.numel():
        rms_norm_kernel[(x.numel() // width,)](x, weight, y, width, epsilon, LANES=num_lanes(width))
    return y


def gated_product(is_gelu: bool, gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape -> silu(gate) * up, or gelu(gate) * up."""
    assert gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape
    y = torch.empty_like(gate)
    if size := gate.numel():
        gated_product_kernel[(num_programs(size, _BLOCK),)](gate, up, y, size, IS_GELU=is_gelu, BLOCK=_BLOCK)
    return y


def rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
) -> None:
    """query turned in place; keys[slots] = turned key, values[slots] = value, by cos and sin [num_tokens, turned]."""
    num_tokens, num_heads, dim = query.shape
    num_kv_heads = key.shape[1]
    for tensor in (query, key, value, keys, values, cos, sin, slots):
        assert tensor.is_contiguous()
    assert key.shape == value.shape == (num_tokens, num_kv_heads, dim) and keys.shape == values.shape
    assert cos.shape == sin.shape and len(cos) == num_tokens and cos.shape[1] <= dim
    assert keys.shape[1:] == key.shape[1:]
    if num_tokens:
        rotate_and_store_kernel[(num_tokens, num_heads + 2 * num_kv_heads)](
            query,
            key,
            value,
            keys,
            values,
            cos,
            sin,
            slots,
            num_heads,
            num_kv_heads,
            DIM=dim,
            TURNED=cos.shape[1],
            LANES=num_lanes(dim // 2),
        )
