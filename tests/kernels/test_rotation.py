"""The native rotation against its definition in torch's operations, and that against complex numbers."""

from __future__ import annotations

import pytest
import torch
from native_numbers import assert_native, make, with_dtype

from fusionserve.kernels.layer_cache import LayerCache
from fusionserve.kernels.rotation import Angles, Rotation, rotate_and_store, rotated


def test_kernels_are_native_here() -> None:
    assert_native("rotate_and_store")


@with_dtype
@pytest.mark.parametrize("turned", [32, 20, 0])
@pytest.mark.parametrize("num_tokens", [1, 40])
@pytest.mark.parametrize("by_neighbours", [False, True])
def test_rotate_and_store(by_neighbours: bool, num_tokens: int, turned: int, dtype: torch.dtype) -> None:
    query, key, value = (make((num_tokens, heads, 32), dtype, heads) for heads in (6, 2, 2))
    angles = make((num_tokens, turned), torch.float32, 9)
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:num_tokens]
    rotation = Rotation(Angles(angles.cos(), angles.sin(), by_neighbours), slots)
    keys, values = torch.zeros(64, 2, 32, dtype=dtype), torch.zeros(64, 2, 32, dtype=dtype)
    expected_query, expected_key = (rotated(heads, rotation.angles) for heads in (query, key))
    turned = rotate_and_store(query.clone(), key, value, LayerCache(keys, values), rotation)
    torch.testing.assert_close(turned, expected_query)
    torch.testing.assert_close(keys[slots], expected_key)
    assert torch.equal(values[slots], value)
    others = [slot for slot in range(64) if slot not in slots.tolist()]
    assert not keys[others].any() and not values[others].any()


@pytest.mark.parametrize("by_neighbours", [False, True])
def test_pairs_are_turned_as_complex_numbers(by_neighbours: bool) -> None:
    heads, angles = make((5, 3, 12), torch.float32), make((5, 4), torch.float32, 1)
    own = heads[..., :8]
    pairs = (
        torch.complex(own[..., 0::2], own[..., 1::2]) if by_neighbours else torch.complex(*own.chunk(2, -1))
    )
    turned = pairs * torch.polar(torch.ones(5, 1, 4), angles[:, None])
    parts = turned.real, turned.imag
    joined = torch.stack(parts, -1).flatten(-2) if by_neighbours else torch.cat(parts, -1)
    twice = torch.cat((angles, angles), -1)
    found = rotated(heads, Angles(twice.cos(), twice.sin(), by_neighbours))
    torch.testing.assert_close(found, torch.cat((joined, heads[..., 8:]), -1))
