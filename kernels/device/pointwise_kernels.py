"""What stands between the products of a model, in Triton. `pointwise.py` has the definitions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalize_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    width: int,
    epsilon: float,
    CENTERS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """y = x / sqrt(mean(x^2) + epsilon), rounded to weight's type, * weight for rows of `width`; programs (row,).

    A LayerNorm centers x before, and adds a bias.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    inside = lanes < width
    own = tl.load(x + row * width + lanes, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    if CENTERS:
        wide = tl.where(inside, wide - tl.sum(wide, axis=0) / width, 0.0)
    normalized = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    scale = tl.load(weight + lanes, mask=inside, other=0.0)
    result = scale.to(tl.float32) * normalized.to(scale.dtype).to(tl.float32)
    if CENTERS:
        result += tl.load(bias + lanes, mask=inside, other=0.0)
    tl.store(y + row * width + lanes, result.to(own.dtype), mask=inside)


@triton.jit
def _activated(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """activation(x), float32."""
    if ACTIVATION == 0:  # SiLU
        return x * _logistic(x)
    if ACTIVATION == 1:  # GELU by its tanh formula, with 2 sqrt(2 / pi)
        return x * _logistic(1.5957691216 * (x + 0.044715 * x * x * x))
    if ACTIVATION == 2:  # GELU
        return 0.5 * x * (1.0 + tl.erf(0.70710678 * x))
    root = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return root if ACTIVATION == 3 else root * root  # ReLU, or its square


@triton.jit
def _logistic(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(tl.minimum(-x, 80.0)))


@triton.jit
def gated_product_kernel(
    gate: tl.tensor, up: tl.tensor, y: tl.tensor, size: int, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """y = activation(gate) * up, by the activation's number; programs (block,)."""
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < size
    own = tl.load(gate + cells, mask=inside, other=0.0)
    activated = _activated(own.to(tl.float32), ACTIVATION).to(own.dtype)
    other = tl.load(up + cells, mask=inside, other=0.0)
    tl.store(y + cells, (activated.to(tl.float32) * other.to(tl.float32)).to(own.dtype), mask=inside)


@triton.jit
def _load_two(start: tl.tensor, first: tl.tensor, second: tl.tensor, inside: tl.tensor) -> tl.tensor:
    """The numbers at two places each, float32."""
    low = tl.load(start + first, mask=inside, other=0.0)
    high = tl.load(start + second, mask=inside, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _turn(
    heads: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    TURNED: tl.constexpr,
    BY_NEIGHBOURS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Pairs of the first TURNED numbers of a head, which are counterparts in their halves, or neighbours."""
    lanes = tl.arange(0, LANES)
    inside, upper = lanes < TURNED // 2, TURNED // 2 + lanes
    first, second = lanes, upper
    if BY_NEIGHBOURS:
        first, second = 2 * lanes, 2 * lanes + 1
    low, high = _load_two(heads, first, second, inside)
    cos_low, cos_high = _load_two(cos, lanes, upper, inside)
    sin_low, sin_high = _load_two(sin, lanes, upper, inside)
    dtype = target.dtype.element_ty
    tl.store(target + first, (low * cos_low - high * sin_low).to(dtype), mask=inside)
    tl.store(target + second, (high * cos_high + low * sin_high).to(dtype), mask=inside)


@triton.jit
def _copy(
    start: tl.tensor, target: tl.tensor, FIRST: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr
) -> None:
    """The numbers [FIRST, DIM) of a head."""
    lanes = tl.arange(0, LANES)
    inside = (lanes >= FIRST) & (lanes < DIM)
    tl.store(target + lanes, tl.load(start + lanes, mask=inside), mask=inside)


@triton.jit
def rotate_and_store_kernel(
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    slots: tl.tensor,
    num_heads: int,
    num_kv_heads: int,
    DIM: tl.constexpr,
    TURNED: tl.constexpr,
    BY_NEIGHBOURS: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Queries turned in place, keys turned into their slots, values into theirs; programs (token, head of any kind).

    Of a head the first TURNED numbers are turned; LANES hold a half of DIM.
    """
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    cos += token * TURNED
    sin += token * TURNED
    if head < num_heads:
        own = query + (token * num_heads + head) * DIM
        _turn(own, own, cos, sin, TURNED, BY_NEIGHBOURS, LANES)
    elif head < num_heads + num_kv_heads:
        head -= num_heads
        start, target = key + (token * num_kv_heads + head) * DIM, keys + (slot * num_kv_heads + head) * DIM
        _turn(start, target, cos, sin, TURNED, BY_NEIGHBOURS, LANES)
        if TURNED < DIM:
            _copy(start, target, TURNED, DIM, 2 * LANES)
    else:
        head -= num_heads + num_kv_heads
        start, target = (
            value + (token * num_kv_heads + head) * DIM,
            values + (slot * num_kv_heads + head) * DIM,
        )
        _copy(start, target, 0, DIM, 2 * LANES)
