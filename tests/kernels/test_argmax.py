"""The best token, natively."""

from __future__ import annotations

import pytest
import torch
from native_numbers import assert_native, make, with_dtype

from fusionserve.kernels.argmax import argmax


def test_kernels_are_native_here() -> None:
    assert_native("argmax")


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
