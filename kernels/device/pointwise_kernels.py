"""What stands between the products of a model, in Triton. `pointwise.py` has the definitions."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rms_norm_kernel(
    x: tl.tensor, weight: tl.tensor, y: tl.tensor, width: int, epsilon: float, LANES: tl.constexpr
) -> None:
    """y = x / sqrt(mean(x^2) + epsilon) * weight for rows of `width`; programs (row,)."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    inside = lanes < width
    own = tl.load(x + row * width + lanes, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    normalized = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + epsilon)
    scale = tl.load(weight + lanes, mask=inside, other=0.0)
    result = scale.to(tl.float32) * normalized.to(own.dtype).to(tl.float32)
    tl.store(y + row * width + lanes, result.to(own.dtype), mask=inside)


@triton.jit
def silu_product_kernel(gate: tl.tensor, up: tl.tensor, y: tl.tensor, size: int, BLOCK: tl.constexpr) -> None:
    """y = silu(gate) * up; programs (block,)."""
    cells = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < size
    own = tl.load(gate + cells, mask=inside, other=0.0)
    wide = own.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(own.dtype)
    other = tl.load(up + cells, mask=inside, other=0.0)
    tl.store(y + cells, (activated.to(tl.float32) * other.to(tl.float32)).to(own.dtype), mask=inside)


@triton.jit
def _halves(start: tl.tensor, lanes: tl.tensor, inside: tl.tensor, DIM: tl.constexpr) -> tl.tensor:
    """Both halves of DIM numbers, float32."""
    low = tl.load(start + lanes, mask=inside, other=0.0)
    high = tl.load(start + DIM // 2 + lanes, mask=inside, other=0.0)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _turn(
    heads: tl.tensor,
    target: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    lanes = tl.arange(0, LANES)
    inside = lanes < DIM // 2
    low, high = _halves(heads, lanes, inside, DIM)
    cos_low, cos_high = _halves(cos, lanes, inside, DIM)
    sin_low, sin_high = _halves(sin, lanes, inside, DIM)
    dtype = target.dtype.element_ty
    tl.store(target + lanes, (low * cos_low - high * sin_low).to(dtype), mask=inside)
    tl.store(target + DIM // 2 + lanes, (high * cos_high + low * sin_high).to(dtype), mask=inside)


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
    LANES: tl.constexpr,
) -> None:
    """Queries turned in place, keys turned into their slots, values into theirs; programs (token, head of any kind)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + token)
    cos += token * DIM
    sin += token * DIM
    if head < num_heads:
        own = query + (token * num_heads + head) * DIM
        _turn(own, own, cos, sin, DIM, LANES)
    elif head < num_heads + num_kv_heads:
        head -= num_heads
        target = keys + (slot * num_kv_heads + head) * DIM
        _turn(key + (token * num_kv_heads + head) * DIM, target, cos, sin, DIM, LANES)
    else:
        head -= num_heads + num_kv_heads
        lanes = tl.arange(0, 2 * LANES)
        own = tl.load(value + (token * num_kv_heads + head) * DIM + lanes, mask=lanes < DIM)
        tl.store(values + (slot * num_kv_heads + head) * DIM + lanes, own, mask=lanes < DIM)
