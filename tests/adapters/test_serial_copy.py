"""Pieces give what the whole operation gives, and stay small enough for one thread."""

from __future__ import annotations

import math

import pytest
import torch

from fusionserve.adapters.serial_copy import (
    PIECE_ELEMENTS,
    copy_into,
    largest_magnitude,
    pieces,
    scale_transposed_into,
)

TORCH_GRAIN_ELEMENTS = 32_768  # from this size on torch spreads an operation over threads
SHAPES = [(1, 1), (3, 5), (16, 4864), (4864, 16), (1, 70_000), (70_000, 1), (2, 40_000)]


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_serial_and_complete(shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape)
    assert all(piece.numel() < TORCH_GRAIN_ELEMENTS for piece in pieces(tensor))
    assert torch.equal(torch.cat(list(pieces(tensor))), tensor.view(-1))
    assert PIECE_ELEMENTS < TORCH_GRAIN_ELEMENTS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_equal_the_whole_operation(shape: tuple[int, int], dtype: torch.dtype) -> None:
    source = torch.randn(shape)
    copied, scaled = torch.empty(shape, dtype=dtype), torch.empty(shape[::-1], dtype=dtype)
    copy_into(copied, source)
    scale_transposed_into(scaled, source, 0.7)
    assert torch.equal(copied, source.to(dtype))
    assert torch.equal(scaled, (source * 0.7).T.to(dtype))
    assert largest_magnitude(source) == float(source.abs().max())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_value_is_seen(value: float) -> None:
    tensor = torch.zeros(70_000)
    tensor[50_000] = value
    assert not largest_magnitude(tensor) <= 1e6
    assert largest_magnitude(torch.empty(0)) == 0
