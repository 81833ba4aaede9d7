"""The native pointwise kernels against their definitions in torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.pointwise import (
    Rotation,
    argmax,
    reference_rms_norm,
    rms_norm,
    rotate_and_store,
    rotated,
    silu_product,
)

DTYPES = [torch.float32, torch.bfloat16]
with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 8), (5, 64), (3, 4, 24), (64, 576)]  # the last is spread over threads


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_kernels_are_native_here() -> None:
    """Else this file compares torch with itself: the machine that tests must have a compiler."""
    assert native_function("rms_norm", torch.zeros(1)) is not None
    assert native_function("rms_norm", torch.zeros(1, dtype=torch.float16)) is None


@with_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = make(shape, dtype) * 3, make(shape[-1:], dtype, 1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), reference_rms_norm(x, weight, 1e-3))


@with_dtype
def test_rms_norm_of_heads_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x, weight = make((6, 4, 16), dtype).transpose(0, 1), make((16,), dtype, 1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), reference_rms_norm(x, weight, 1e-6))


@with_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = make(shape, dtype) * 8, make(shape, dtype, 1)
    torch.testing.assert_close(silu_product(gate, up), functional.silu(gate) * up)


@with_dtype
def test_silu_product_of_extremes(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e30, -300.0, -88.5, -87.0, 0.0, 87.0, 88.5, 300.0, 1e30], dtype=dtype)
    up = torch.ones_like(gate)
    torch.testing.assert_close(silu_product(gate, up), functional.silu(gate), rtol=1e-5, atol=1e-30)
    bad = torch.tensor([float("inf"), float("nan")], dtype=dtype)
    assert silu_product(bad, torch.ones_like(bad)).isfinite().tolist() == [False, False]


def test_silu_of_every_bfloat16() -> None:
    """Rounded once: seldom another number than the nearest, and then its neighbour."""
    gate = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.float().abs() > 1e-30)]
    found = silu_product(gate, torch.ones_like(gate))
    expected = functional.silu(gate.double()).bfloat16()
    normal = expected.float().abs() > 1e-30  # smaller ones are taken for zero
    steps = (found.view(torch.int16).int() - expected.view(torch.int16).int())[normal].abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
    assert found[~normal].float().abs().max() < 1e-29


@with_dtype
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_rotate_and_store(num_tokens: int, dtype: torch.dtype) -> None:
    query, key, value = (make((num_tokens, heads, 32), dtype, heads) for heads in (6, 2, 2))
    angles = make((num_tokens, 32), torch.float32, 9)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:num_tokens]
    rotation = Rotation(angles.cos().to(dtype), angles.sin().to(dtype), slots)
    keys, values = torch.zeros(64, 2, 32, dtype=dtype), torch.zeros(64, 2, 32, dtype=dtype)
    wide = Rotation(rotation.cos.float(), rotation.sin.float(), slots)
    expected_query, expected_key = (rotated(heads.float(), wide).to(dtype) for heads in (query, key))
    turned = rotate_and_store(query.clone(), key, value, LayerCache(keys, values), rotation)
    torch.testing.assert_close(turned, expected_query)
    torch.testing.assert_close(keys[slots], expected_key)
    assert torch.equal(values[slots], value)
    others = [slot for slot in range(64) if slot not in slots.tolist()]
    assert not keys[others].any() and not values[others].any()


@with_dtype
@pytest.mark.parametrize("width", [1, 7, 64, 5000])
def test_argmax_is_the_first_of_the_largest(width: int, dtype: torch.dtype) -> None:
    x = (make((9, width), torch.float32) * 4).round().to(dtype)
    assert argmax(x).tolist() == [row.index(max(row)) for row in x.tolist()]


@with_dtype
def test_argmax_of_rows_that_are_not_finite(dtype: torch.dtype) -> None:
    x = torch.zeros(5, 40, dtype=dtype)
    x[0, 3], x[1, 39], x[2], x[3, 0] = float("nan"), float("inf"), float("-inf"), float("-inf")
    assert argmax(x).tolist() == [-1, -1, -1, 1, 0]
