"""The native activations against their definitions in torch's operations."""

from __future__ import annotations

import math

import pytest
import torch
from native_numbers import SHAPES, assert_native, make, with_dtype
from torch import Tensor

from fusionserve.kernels.activations import (
    Activation,
    activate,
    gated_product,
    reference_gated_product,
)


def exact(activation: Activation, x: Tensor) -> Tensor:
    """In float64, without a difference of numbers near one."""
    match activation:
        case Activation.SILU:
            return x * torch.sigmoid(x)
        case Activation.GELU_TANH:
            return x * torch.sigmoid((8 / math.pi) ** 0.5 * (x + 0.044715 * x**3))
        case Activation.GELU:
            return x * torch.special.erfc(-x / 2**0.5) / 2
        case Activation.RELU:
            return x.clamp(min=0)
        case Activation.RELU_SQUARED:
            return x.clamp(min=0) ** 2


def assert_rounded_twice(found: Tensor, expected: Tensor) -> None:
    """What the type makes of float64 numbers in two steps. torch's own GELU is up to five times as far off."""
    numbers = torch.finfo(found.dtype)
    tiny = 4 * numbers.smallest_normal * numbers.eps  # some of the smallest numbers that the type has
    torch.testing.assert_close(
        found.double(), expected, rtol=max(2 * numbers.eps, 2e-6), atol=max(tiny, 1e-9)
    )


def test_kernels_are_native_here() -> None:
    assert_native("gated_product")


@with_dtype
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    gate, up = make(shape, dtype) * 8, make(shape, dtype, 1)
    expected = exact(activation, gate.double()) * up.double()
    assert_rounded_twice(gated_product(activation, gate, up), expected)


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


@with_dtype
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("shape", SHAPES)
def test_activate(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    x = make(shape, dtype) * 8
    expected = exact(activation, x.double())
    found = activate(activation, x)
    assert_rounded_twice(found, expected)
    assert found.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("activation", Activation)
def test_numbers_in_a_rows_end_are_activated_as_in_its_middle(activation: Activation) -> None:
    x = make((37,), torch.bfloat16) * 8
    alone = torch.cat([activate(activation, number.clone()) for number in x[:, None]])
    assert torch.equal(activate(activation, x.clone()), alone)


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
