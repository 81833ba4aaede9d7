"""What the tests of native kernels have in common: types, shapes, numbers, and that the kernels are native at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.native_call import native_function

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = [(1, 8), (5, 64), (3, 4, 24), (64, 576)]  # the last is spread over threads


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Seeded normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_native(name: str) -> None:
    """Else a test compares torch with itself: the machine that tests must have a compiler."""
    for dtype in DTYPES:
        assert native_function(name, torch.zeros(1, dtype=dtype)) is not None
    assert native_function(name, torch.zeros(1, dtype=torch.float64)) is None
