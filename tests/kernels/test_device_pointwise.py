"""The pointwise kernels in Triton, in its interpreter without a GPU, against the definitions."""

from __future__ import annotations

import pytest
import torch
from device_kernels import DEVICE
from torch import Tensor

from fusionserve.kernels.activations import Activation, reference_gated_product
from fusionserve.kernels.device.pointwise_launch import gated_product, normalize, rotate_and_store
from fusionserve.kernels.norms import LayerNorm, RMSNorm, reference_normalize
from fusionserve.kernels.rotation import Angles, rotated

pytestmark = pytest.mark.gpu

with_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SHAPES = [(1, 8), (5, 64), (3, 4, 24), (6, 576)]


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


@with_dtype
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape: tuple[int, ...], is_wide: bool, dtype: torch.dtype) -> None:
    x, weight = make(shape, dtype) * 3, make(shape[-1:], torch.float32 if is_wide else dtype, 1)
    expected = reference_normalize(x, RMSNorm(weight, 1e-3))
    torch.testing.assert_close(normalize(x, weight, None, 1e-3), expected)


@with_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = make(shape, dtype) * 3 + 2
    weight, bias = (make(shape[-1:], torch.float32, seed) for seed in (1, 2))
    expected = reference_normalize(x, LayerNorm(weight, bias, 1e-3))
    torch.testing.assert_close(normalize(x, weight, bias, 1e-3), expected)


@with_dtype
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_product(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    gate, up = make(shape, dtype) * 8, make(shape, dtype, 1)
    found = gated_product(activation, gate, up)
    torch.testing.assert_close(found, reference_gated_product(activation, gate, up))


@with_dtype
@pytest.mark.parametrize(("dim", "turned"), [(32, 32), (24, 24), (24, 16), (24, 0)])
@pytest.mark.parametrize("by_neighbours", [False, True])
def test_rotate_and_store(by_neighbours: bool, dim: int, turned: int, dtype: torch.dtype) -> None:
    query, key, value = (make((9, heads, dim), dtype, heads) for heads in (6, 2, 3))
    value = value[:, :2].contiguous()
    angles = make((9, turned), torch.float32, 9)
    slots = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:9].to(DEVICE)
    cos, sin = angles.cos(), angles.sin()
    keys, values = (torch.zeros(20, 2, dim, dtype=dtype, device=DEVICE) for _ in range(2))
    expected_query, expected_key = (rotated(heads, Angles(cos, sin, by_neighbours)) for heads in (query, key))
    rotate_and_store(query, key, value, keys, values, cos, sin, slots, by_neighbours)
    torch.testing.assert_close(query, expected_query)
    torch.testing.assert_close(keys[slots], expected_key)
    assert torch.equal(values[slots], value)
    others = [slot for slot in range(20) if slot not in slots.tolist()]
    assert not keys[others].any() and not values[others].any()
