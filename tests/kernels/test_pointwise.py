"""The native pointwise kernels against their definitions in torch's operations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.pointwise import (
    Activation,
    Angles,
    RMSNorm,
    Rotation,
    argmax,
    gated_product,
    reference_gated_product,
    reference_rms_norm,
    rms_norm,
    rotate_and_store,
    rotated,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 8), (5, 64), (3, 4, 24), (64, 576)]  # the last is spread over threads


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_kernels_are_native_here() -> None:
    """Else this file compares torch with itself: the machine that tests must have a compiler."""
    for dtype in DTYPES:
        assert native_function("rms_norm", torch.zeros(1, dtype=dtype)) is not None
    assert native_function("rms_norm", torch.zeros(1, dtype=torch.float64)) is None


@with_dtype
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], is_wide: bool, dtype: torch.dtype) -> None:
    x, weight = make(shape, dtype) * 3, make(shape[-1:], torch.float32 if is_wide else dtype, 1)
    norm = RMSNorm(weight, 1e-3)
    torch.testing.assert_close(rms_norm(x, norm), reference_rms_norm(x, norm))


def test_wide_weight_multiplies_before_anything_is_rounded() -> None:
    x, weight = make((40, 64), torch.bfloat16), make((64,), torch.bfloat16, 1)
    wide = RMSNorm(weight.float(), 1e-6)
    expected = reference_rms_norm(x.double().float(), wide).bfloat16()
    assert torch.equal(rms_norm(x, wide), expected)
    assert not torch.equal(rms_norm(x, RMSNorm(weight, 1e-6)), expected)


@with_dtype
def test_rms_norm_of_heads_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x, norm = make((6, 4, 16), dtype).transpose(0, 1), RMSNorm(make((16,), dtype, 1), 1e-6)
    torch.testing.assert_close(rms_norm(x, norm), reference_rms_norm(x, norm))


@with_dtype
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    gate, up = make(shape, dtype) * 8, make(shape, dtype, 1)
    expected = reference_gated_product(activation, gate, up)
    torch.testing.assert_close(gated_product(activation, gate, up), expected)


@with_dtype
@pytest.mark.parametrize("activation", Activation)
def test_gated_product_of_extremes(activation: Activation, dtype: torch.dtype) -> None:
    most = min(1e30, torch.finfo(dtype).max)
    gate = torch.tensor([-most, -300.0, -88.5, -87.0, 0.0, 87.0, 88.5, 300.0, most], dtype=dtype)
    up = torch.ones_like(gate)
    expected = reference_gated_product(activation, gate, up)
    torch.testing.assert_close(gated_product(activation, gate, up), expected, rtol=1e-5, atol=1e-30)
    bad = torch.tensor([float("inf"), float("nan")], dtype=dtype)
    assert gated_product(activation, bad, torch.ones_like(bad)).isfinite().tolist() == [False, False]


def exact(activation: Activation, x: Tensor) -> Tensor:
    """In float64, without the tanh formula's difference of numbers near one."""
    inner = x if activation is Activation.SILU else (8 / math.pi) ** 0.5 * (x + 0.044715 * x**3)
    return x * torch.sigmoid(inner)


@pytest.mark.parametrize("activation", Activation)
def test_activation_of_every_bfloat16(activation: Activation) -> None:
    """Rounded once: seldom another number than the nearest, and then its neighbour."""
    gate = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.float().abs() > 1e-30)]
    found = gated_product(activation, gate, torch.ones_like(gate))
    expected = exact(activation, gate.double()).bfloat16()
    normal = expected.float().abs() > 1e-30  # smaller ones are taken for zero
    steps = (found.view(torch.int16).int() - expected.view(torch.int16).int())[normal].abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
    assert found[~normal].float().abs().max() < 1e-29


@with_dtype
@pytest.mark.parametrize("turned", [32, 20, 0])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_rotate_and_store(num_tokens: int, turned: int, dtype: torch.dtype) -> None:
    query, key, value = (make((num_tokens, heads, 32), dtype, heads) for heads in (6, 2, 2))
    angles = make((num_tokens, turned), torch.float32, 9)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:num_tokens]
    rotation = Rotation(Angles(angles.cos(), angles.sin()), slots)
    keys, values = torch.zeros(64, 2, 32, dtype=dtype), torch.zeros(64, 2, 32, dtype=dtype)
    expected_query, expected_key = (rotated(heads, rotation.angles) for heads in (query, key))
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
