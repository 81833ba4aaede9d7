"""The native pointwise kernels against their definitions in torch's operations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.native_call import native_function
from fusionserve.kernels.pointwise import (
    Angles,
    Rotation,
    argmax,
    rotate_and_store,
    rotated,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_kernels_are_native_here() -> None:
    """Else this file compares torch with itself: the machine that tests must have a compiler."""
    for dtype in DTYPES:
        assert native_function("rotate_and_store", torch.zeros(1, dtype=dtype)) is not None
    assert native_function("rotate_and_store", torch.zeros(1, dtype=torch.float64)) is None


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
