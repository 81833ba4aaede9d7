"""Segments and member attention, natively, against the definitions."""

from __future__ import annotations

import pytest
import torch
from kernel_rows import as_kernels_take
from torch import Tensor

from fusionserve.kernels.fusion_weights import masked_softmax, member_scores, with_base_member
from fusionserve.kernels.rank_panels import has_panels
from fusionserve.kernels.segments import (
    Addition,
    Additions,
    FusionAttention,
    MemberAttention,
    PartRows,
    Segment,
    Segments,
    can_add,
)

CAPACITY = 80
D_INS = [61, 70, 608]  # rows in panels have pairs of inputs; tile registers take the last
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
with_d_in = pytest.mark.parametrize("d_in", D_INS)
with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_rows(d_in: int, d_out: int, dtype: torch.dtype, *, bias: bool) -> PartRows:
    """Row by row, as the definition has them."""
    shrink = make((CAPACITY, d_in), dtype, 1) * d_in**-0.5
    return PartRows(shrink, make((CAPACITY,), dtype, 2) if bias else None, make((CAPACITY, d_out), dtype, 3))


def expected_output(x: Tensor, rows: PartRows, y: Tensor, segments: list[Segment]) -> Tensor:
    """y plus each segment's delta, in float64; in panels what weighs a row is rounded before it does."""
    wide = y.double()
    bias = torch.zeros(CAPACITY) if rows.bias is None else rows.bias
    for segment in segments:
        tokens = slice(segment.token_start, segment.token_end)
        here = slice(segment.row_start, segment.row_end)
        u = x[tokens].double() @ rows.shrink[here].double().T + bias[here].double()
        weighted = segment.coefficients.double() * u
        if has_panels(x.shape[1], x):
            weighted = weighted.bfloat16().double()
        wide[tokens] += weighted @ rows.expand[here].double()
    return wide


def make_segments() -> list[Segment]:
    """Ranks 1 to 33, one token and several, a blend of two, shared and own coefficients; tokens 0 and 5 are base."""
    return [
        Segment(1, 2, 0, 16, 16, torch.full((1, 16), 0.5)),
        Segment(2, 5, 16, 17, 2, torch.tensor([[1.0], [0.0], [-2.0]])),
        Segment(6, 8, 18, 51, 34, make((2, 33), torch.float32, 4)),
        Segment(8, 9, 52, 57, 6, torch.ones(1, 5)),
        Segment(8, 9, 58, 68, 10, torch.full((1, 10), 0.25)),
    ]


def test_segments_are_native_here() -> None:
    assert can_add(torch.zeros(0))
    assert not can_add(torch.zeros(0, dtype=torch.float64))


@with_dtype
@with_d_in
@pytest.mark.parametrize("bias", [True, False])
def test_segments_of_several_modules_equal_the_definition(dtype: torch.dtype, d_in: int, bias: bool) -> None:
    x = make((10, d_in), dtype, 0)
    parts = [make_rows(d_in, d_out, dtype, bias=bias) for d_out in (7, 128, 300)]
    outputs = [make((10, rows.expand.shape[1]), dtype, 5) for rows in parts]
    segments = make_segments()
    expected = [expected_output(x, rows, y, segments) for rows, y in zip(parts, outputs, strict=True)]
    before = [y.clone() for y in outputs]
    residents = [(segment.row_start, segment.extent) for segment in segments]
    additions = Additions([Addition({i: as_kernels_take(rows, residents) for i, rows in enumerate(parts)})])
    Segments(segments, x).add_(x, additions, outputs)
    for y, wide, untouched in zip(outputs, expected, before, strict=True):
        torch.testing.assert_close(y.double(), wide, rtol=ERRORS[dtype], atol=0.02)
        assert torch.equal(y[[0, 5, 9]], untouched[[0, 5, 9]])


@with_dtype
@with_d_in
@pytest.mark.parametrize("num_rows", [1, 16, 21, 32, 60, 69])
def test_token_gets_the_same_bits_in_any_company(dtype: torch.dtype, d_in: int, num_rows: int) -> None:
    num_tokens = 89
    x, before = make((num_tokens, d_in), dtype, 0), make((num_tokens, 200), dtype, 5)
    extent = num_rows + num_rows % 2
    rows = as_kernels_take(make_rows(d_in, 200, dtype, bias=True), [(0, extent)])
    additions = Additions([Addition({0: rows})])

    def added(size: int) -> Tensor:
        ends = [min(start + size, num_tokens) for start in range(0, num_tokens, size)]
        starts = range(0, num_tokens, size)
        segments = [
            Segment(start, end, 0, num_rows, extent, torch.full((1, num_rows), 0.3))
            for start, end in zip(starts, ends, strict=True)
        ]
        y = before.clone()
        Segments(segments, x).add_(x, additions, [y])
        return y

    alone = added(1)
    assert not torch.equal(alone, before)
    for size in (2, 3, 7, 16, 24, 40, 64, num_tokens):
        assert torch.equal(added(size), alone), size


@with_dtype
@with_d_in
def test_zero_coefficient_means_zero_whatever_the_input(dtype: torch.dtype, d_in: int) -> None:
    rows = as_kernels_take(make_rows(d_in, 20, dtype, bias=False), [(0, 4)])
    x, y = torch.full((2, d_in), float("inf"), dtype=dtype), torch.zeros(2, 20, dtype=dtype)
    segments = [Segment(0, 1, 0, 4, 4, torch.zeros(1, 4)), Segment(1, 2, 0, 4, 4, torch.ones(1, 4))]
    Segments(segments, x).add_(x, Additions([Addition({0: rows})]), [y])
    assert not y[0].any()
    assert not y[1].isfinite().any()


ALLOWED = {
    "all": None,
    "some": torch.tensor([True, False, True]),
    "by token": torch.tensor(
        [[True, True, True], [False, True, False], [False, False, False], [True, False, True]]
    ),
}


@with_dtype
@with_d_in
@pytest.mark.parametrize("allowed", ALLOWED.values(), ids=ALLOWED.keys())
@pytest.mark.parametrize("member_keys", [True, False])
@pytest.mark.parametrize("base_member", [True, False])
def test_attention_over_members_equals_the_definition(
    dtype: torch.dtype, d_in: int, allowed: Tensor | None, member_keys: bool, base_member: bool
) -> None:
    member_of_row, start, extent, num_tokens = torch.tensor([0, 0, 0, 1, 2, 2]), 5, 16, 4
    x, rows = make((7, d_in), dtype, 0), make_rows(d_in, 8, dtype, bias=True)
    assert rows.bias is not None
    fusion = FusionAttention(
        token_start=2,
        token_end=2 + num_tokens,
        row_start=start,
        extent=extent,
        member_of_row=member_of_row,
        num_members=3,
        has_member_keys=member_keys,
        has_base_member=base_member,
        allowed=allowed,
    )
    coefficients = torch.full((num_tokens, 6), float("nan"))
    taken = as_kernels_take(rows, [(start, extent)])
    attention = MemberAttention(taken, fusion, coefficients)
    segment, y = Segment(2, 2 + num_tokens, start, start + 6, extent, coefficients), make((7, 8), dtype, 5)
    expected_y = y.double()
    Segments([segment], x).add_(x, Additions([Addition({0: taken}, [attention])]), [y])
    weights = attention.weights
    outputs = (
        x[2:6].double() @ rows.shrink[start : start + 15].double().T + rows.bias[start : start + 15].double()
    )
    scores = member_scores(
        outputs[:, :6], outputs[:, 6:12], member_of_row, 3, outputs[:, 12:15] if member_keys else None
    )
    mask = None if allowed is None else allowed.expand(num_tokens, -1)
    if base_member:
        scores = with_base_member(scores)
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=True)
    expected = masked_softmax(scores, mask)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(coefficients, weights[:, member_of_row])
    expected_y[2:6] += (outputs[:, :6] * coefficients) @ rows.expand[start : start + 6].double()
    torch.testing.assert_close(y.double(), expected_y, rtol=ERRORS[dtype], atol=0.02)
