"""The pointwise kernels in Triton, in its interpreter without a GPU, against the definitions."""

from __future__ import annotations

import pytest
import torch
from device_kernels import DEVICE
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.device.pointwise_launch import rms_norm, rotate_and_store, silu_product
from fusionserve.kernels.pointwise import Rotation, reference_rms_norm, rotated

pytestmark = pytest.mark.gpu

with_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(1, 8), (5, 64), (3, 4, 24), (6, 576)]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@with_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = make(shape, dtype) * 3, make(shape[-1:], dtype, 1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-3), reference_rms_norm(x, weight, 1e-3))


@with_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_product(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    gate, up = make(shape, dtype) * 8, make(shape, dtype, 1)
    torch.testing.assert_close(silu_product(gate, up), functional.silu(gate) * up)


@with_dtype
@pytest.mark.parametrize("dim", [32, 24])
def test_rotate_and_store(dim: int, dtype: torch.dtype) -> None:
    query, key, value = (make((9, heads, dim), dtype, heads) for heads in (6, 2, 3))
    value = value[:, :2].contiguous()
    angles = make((9, dim), torch.float32, 9)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:9].to(DEVICE)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = (torch.zeros(20, 2, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    wide = Rotation(cos.float(), sin.float(), slots)
    expected_query, expected_key = (rotated(heads.float(), wide).to(dtype) for heads in (query, key))
    rotate_and_store(query, key, value, keys, values, cos, sin, slots)
    torch.testing.assert_close(query, expected_query)
    torch.testing.assert_close(keys[slots], expected_key)
    assert torch.equal(values[slots], value)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not keys[others].any() and not values[others].any()
