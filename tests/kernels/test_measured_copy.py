"""Copies give what the whole operation gives and say how large it is; pieces stay small enough for one thread."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fusionserve.kernels import measured_copy
from fusionserve.kernels.measured_copy import (
    PIECE_ELEMENTS,
    Copy,
    MeasuredCopies,
    copy_measured,
    largest_magnitude,
    pieces,
)

TORCH_GRAIN_ELEMENTS = 32_768  # from this size on torch spreads an operation over threads
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (16, 4864), (4864, 16), (1, 70_000), (70_000, 1), (2, 40_000), (67, 33)]


@pytest.fixture(params=["native", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is of both ways."""
    if request.param == "torch":
        monkeypatch.setattr(measured_copy, "native_library", lambda: None)


def transpose(target: torch.Tensor, source: torch.Tensor, scale: float) -> float:
    """target = scale * source^T; returns what was measured."""
    (largest,) = MeasuredCopies([transposed(target, source, scale)]).run(bytes_of(source), bytes_of(target))
    return largest


def transposed(
    target: torch.Tensor, source: torch.Tensor, scale: float, source_start: int = 0, target_start: int = 0
) -> Copy:
    return Copy(
        source=source_start,
        target=target_start,
        source_dtype=source.dtype,
        target_dtype=target.dtype,
        num_rows=source.shape[0],
        num_columns=source.shape[1],
        scale=scale,
    )


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_are_serial_and_complete(shape: tuple[int, int]) -> None:
    tensor = torch.randn(shape)
    assert all(piece.numel() < TORCH_GRAIN_ELEMENTS for piece in pieces(tensor))
    assert torch.equal(torch.cat(list(pieces(tensor))), tensor.view(-1))
    assert PIECE_ELEMENTS < TORCH_GRAIN_ELEMENTS


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source_dtype", DTYPES, ids=str)
def test_copies_equal_the_whole_operation(
    shape: tuple[int, int], dtype: torch.dtype, source_dtype: torch.dtype
) -> None:
    source = torch.randn(shape).to(source_dtype)
    copied, scaled = torch.empty(shape, dtype=dtype), torch.empty(shape[::-1], dtype=dtype)
    assert copy_measured(copied, source) == float(copied.abs().max())
    assert transpose(scaled, source, 0.7) == float(scaled.abs().max())
    assert torch.equal(copied, source.to(dtype))
    assert torch.equal(scaled, (source.float() * 0.7).T.to(dtype))
    assert largest_magnitude(source) == float(source.abs().max())


def test_many_of_all_types_are_measured_one_by_one() -> None:
    pairs = list(itertools.product(DTYPES, DTYPES))
    sources = [torch.randn(40, 20).to(dtype) * (place + 1) for place, (dtype, _) in enumerate(pairs)]
    room = 40 * 20 * 4
    source, target = (torch.zeros(len(pairs) * room, dtype=torch.uint8) for _ in range(2))
    copies, wanted = [], []
    for place, (numbers, (_, dtype)) in enumerate(zip(sources, pairs, strict=True)):
        start, end = place * room, (len(pairs) - 1 - place) * room
        source[start : start + numbers.nbytes] = bytes_of(numbers)
        wanted.append((numbers.float() * 2).T.to(dtype))
        copies.append(transposed(wanted[-1], numbers, 2.0, start, end))
    for _ in range(2):  # as often as one likes
        largest = MeasuredCopies(copies).run(source, target)
        assert largest == [float(expected.abs().max()) for expected in wanted]
        for copy, expected in zip(copies, wanted, strict=True):
            assert torch.equal(
                target[copy.target : copy.target_end].view(expected.dtype).view(20, 40), expected
            )
        target.zero_()


def test_only_the_bad_one_of_many_is_named() -> None:
    source = torch.ones(3, 100, 16)
    source[1, 70, 9] = math.nan
    target = torch.empty(3, 16, 100, dtype=torch.bfloat16)
    copies = [
        transposed(target[i], source[i], 1.0, i * source[0].nbytes, i * target[0].nbytes) for i in range(3)
    ]
    largest = MeasuredCopies(copies).run(bytes_of(source), bytes_of(target))
    assert [math.isnan(found) for found in largest] == [False, True, False]


def test_memory_is_as_long_as_the_copies_say() -> None:
    source, target = torch.ones(10, 10), torch.ones(10, 10)
    copies = MeasuredCopies([transposed(target, source, 1.0, 4)])
    with pytest.raises(AssertionError):
        copies.run(bytes_of(source), bytes_of(target))
    assert MeasuredCopies([]).run(bytes_of(source), bytes_of(target)) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_bad_value_is_seen(value: float, dtype: torch.dtype) -> None:
    tensor = torch.zeros(70_000, 1, dtype=dtype)
    tensor[50_000] = value
    assert not largest_magnitude(tensor) <= 1e6
    assert not copy_measured(torch.empty(70_000, 1), tensor) <= 1e6
    assert not transpose(torch.empty(1, 70_000), tensor, 0.5) <= 1e6
    assert largest_magnitude(torch.empty(0)) == 0


def test_every_float16_is_the_same_number_in_float32_and_back() -> None:
    numbers = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    wide, back = torch.empty(len(numbers)), torch.empty_like(numbers)
    copy_measured(wide, numbers)
    assert torch.equal(wide.nan_to_num(0.5), numbers.float().nan_to_num(0.5))
    copy_measured(back, wide)
    same = back.view(torch.int16) == numbers.view(torch.int16)
    assert torch.equal(same | numbers.isnan(), torch.ones(len(numbers), dtype=torch.bool))
    assert back[numbers.isnan()].isnan().all()


def test_float32_is_rounded_to_the_nearest_float16() -> None:
    """Ties to even, fractions below the least normal number, and what is too large."""
    bits = torch.randint(-(2**31), 2**31, (1_000_000,), generator=torch.Generator().manual_seed(0))
    exponents = torch.linspace(2.0**-26, 2.0**-13, 100_001)
    ties = torch.arange(0, 70_000, 4).float() + torch.tensor([0.0, 16.0])[:, None]
    numbers = torch.cat((bits.to(torch.int32).view(torch.float32), exponents, -ties.flatten()))
    rounded = torch.empty(len(numbers), dtype=torch.float16)
    copy_measured(rounded, numbers)
    expected = numbers.half()
    assert torch.equal(rounded.isnan(), expected.isnan())
    assert torch.equal(rounded.nan_to_num(0.5).view(torch.int16), expected.nan_to_num(0.5).view(torch.int16))
