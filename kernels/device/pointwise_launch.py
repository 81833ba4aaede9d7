"""The launches of the pointwise kernels; contiguous tensors of one type, as `pointwise.py` has them."""

from __future__ import annotations

import torch
from torch import Tensor

from fusionserve.kernels.device.pointwise_kernels import (
    gated_product_kernel,
    normalize_kernel,
    rotate_and_store_kernel,
)
from fusionserve.kernels.device.triton_use import num_lanes, num_programs

_BLOCK = 1024


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """x [..., width], weight and bias [width] -> like x; with a bias it is a LayerNorm."""
    assert x.is_contiguous() and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    width, y, centers = x.shape[-1], torch.empty_like(x), bias is not None
    if x.numel():
        normalize_kernel[(x.numel() // width,)](
            x,
            weight,
            weight if bias is None else bias,
            y,
            width,
            epsilon,
            CENTERS=centers,
            LANES=num_lanes(width),
        )
    return y


def gated_product(activation: int, gate: Tensor, up: Tensor) -> Tensor:
    """gate and up of one shape -> activation(gate) * up, by the activation's number."""
    assert gate.is_contiguous() and up.is_contiguous() and gate.shape == up.shape
    y = torch.empty_like(gate)
    if size := gate.numel():
        grid = (num_programs(size, _BLOCK),)
        gated_product_kernel[grid](gate, up, y, size, ACTIVATION=int(activation), BLOCK=_BLOCK)
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
    by_neighbours: bool = False,
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
            BY_NEIGHBOURS=by_neighbours,
            LANES=num_lanes(dim // 2),
        )
