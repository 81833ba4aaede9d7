"""The native norms against their definitions in torch's operations."""

from __future__ import annotations

import pytest
import torch
from native_numbers import SHAPES, assert_native, make, with_dtype
from torch.nn import functional

from fusionserve.kernels.norms import LayerNorm, RMSNorm, normalize, reference_normalize


def test_kernels_are_native_here() -> None:
    assert_native("normalize")


@with_dtype
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], is_wide: bool, dtype: torch.dtype) -> None:
    x, weight = make(shape, dtype) * 3, make(shape[-1:], torch.float32 if is_wide else dtype, 1)
    norm = RMSNorm(weight, 1e-3)
    torch.testing.assert_close(normalize(x, norm), reference_normalize(x, norm))


def test_wide_weight_multiplies_before_anything_is_rounded() -> None:
    x, weight = make((40, 64), torch.bfloat16), make((64,), torch.bfloat16, 1)
    wide = RMSNorm(weight.float(), 1e-6)
    expected = reference_normalize(x.double().float(), wide).bfloat16()
    assert torch.equal(normalize(x, wide), expected)
    assert not torch.equal(normalize(x, RMSNorm(weight, 1e-6)), expected)


@with_dtype
def test_rms_norm_of_heads_that_are_not_contiguous(dtype: torch.dtype) -> None:
    x, norm = make((6, 4, 16), dtype).transpose(0, 1), RMSNorm(make((16,), dtype, 1), 1e-6)
    torch.testing.assert_close(normalize(x, norm), reference_normalize(x, norm))


@with_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make(shape, dtype) * 3 + 2
    norm = LayerNorm(make(shape[-1:], torch.float32, 1), make(shape[-1:], torch.float32, 2), 1e-3)
    torch.testing.assert_close(normalize(x, norm), reference_normalize(x, norm))


@with_dtype
def test_layer_norm_is_that_of_torch(dtype: torch.dtype) -> None:
    x, weight, bias = make((7, 40), dtype) * 3 + 2, make((40,), dtype, 1), make((40,), dtype, 2)
    expected = functional.layer_norm(x, (40,), weight, bias, 1e-5)
    norm = LayerNorm(weight.float(), bias.float(), 1e-5)
    torch.testing.assert_close(normalize(x, norm), expected)
    torch.testing.assert_close(reference_normalize(x, norm), expected)


def test_layer_norm_of_numbers_far_from_zero() -> None:
    """Their spread is not taken from the mean of their squares, which would lose it."""
    x = make((3, 64), torch.float32) + 1e3
    norm = LayerNorm(torch.ones(64), torch.zeros(64), 1e-5)
    expected = functional.layer_norm(x.double(), (64,), eps=1e-5).float()
    torch.testing.assert_close(normalize(x, norm), expected, rtol=1e-3, atol=1e-4)
