"""Spans: where they are cut, and that their products are the definition, whatever the requests."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionserve.adapters.row_plan import (
    AdaptedTokens,
    RowPlan,
    RowRange,
    Span,
    plan_segments,
    plan_spans,
    span_cost,
    suits_segment,
)
from fusionserve.kernels.low_rank import expand_, reference_delta, shrink, weigh_
from fusionserve.kernels.segments import can_add

CPU = torch.device("cpu")


def plan(*adapted: AdaptedTokens) -> tuple[Span, ...]:
    return plan_spans(adapted, dtype=torch.float32, device=CPU)


def tokens(start: int, end: int, *rows: tuple[int, int, float]) -> AdaptedTokens:
    return AdaptedTokens(start, end, tuple(RowRange(*row) for row in rows))


def box(span: Span) -> tuple[int, int, int, int]:
    return span.token_start, span.token_end, span.row_start, span.row_end


TABLE = {
    "nothing": ((), []),
    "one request": ((tokens(2, 9, (4, 12, 1.0)),), [(2, 9, 4, 12)]),
    "decoding tokens share a span": (
        tuple(tokens(3 + i, 4 + i, (8 * i, 8 * i + 8, 1.0)) for i in range(8)),
        [(3, 11, 0, 64)],
    ),
    "long prompts get their own": (
        (tokens(0, 500, (0, 16, 1.0)), tokens(500, 1000, (16, 32, 1.0))),
        [(0, 500, 0, 16), (500, 1000, 16, 32)],
    ),
    "decoding beside a long prompt": (
        (tokens(0, 1, (0, 8, 1.0)), tokens(1, 2, (8, 16, 1.0)), tokens(2, 802, (8, 16, 1.0))),
        [(0, 2, 0, 16), (2, 802, 8, 16)],
    ),
    "one adapter's prompts share a span": (
        (tokens(0, 300, (0, 8, 1.0)), tokens(300, 600, (0, 8, 0.5))),
        [(0, 600, 0, 8)],
    ),
    "rows far apart do not pay for those between": (
        (tokens(0, 1, (0, 8, 1.0)), tokens(1, 2, (4000, 4008, 1.0))),
        [(0, 1, 0, 8), (1, 2, 4000, 4008)],
    ),
    "blend spans the rows between its members": (
        (tokens(0, 4, (20, 24, 0.5), (2, 6, 0.5)),),
        [(0, 4, 2, 24)],
    ),
    "base tokens between are no obstacle": (
        (tokens(0, 1, (0, 8, 1.0)), tokens(9, 10, (0, 8, 1.0))),
        [(0, 10, 0, 8)],
    ),
}


@pytest.mark.parametrize(("adapted", "boxes"), TABLE.values(), ids=TABLE)
def test_spans_are_cut_by_cost(adapted: tuple[AdaptedTokens, ...], boxes: list[tuple[int, ...]]) -> None:
    assert [box(span) for span in plan(*adapted)] == boxes


def test_coefficients_are_the_owners_and_zero_elsewhere() -> None:
    (span,) = plan(tokens(0, 1, (0, 2, 0.5)), tokens(2, 4, (3, 4, -1.0), (0, 2, 2.0)))
    assert span.coefficients.tolist() == [
        [0.5, 0.5, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
        [2.0, 2.0, 0.0, -1.0],
        [2.0, 2.0, 0.0, -1.0],
    ]


def test_single_request_shares_one_row_of_coefficients() -> None:
    (span,) = plan(tokens(0, 100, (2, 5, 0.5), (0, 2, 3.0)))
    assert span.coefficients.tolist() == [[3.0, 3.0, 0.5, 0.5, 0.5]]


def test_member_named_twice_adds_up() -> None:
    (span,) = plan(tokens(0, 3, (0, 2, 0.5), (0, 2, 0.75)))
    assert span.coefficients.tolist() == [[1.25, 1.25]]


@pytest.mark.skipif(not can_add(torch.zeros(0)), reason="segments are the native kernel's")
def test_segment_of_neighbours_on_the_same_rows_has_the_coefficient_of_each() -> None:
    adapted = [tokens(0, 2, (0, 2, 0.5)), tokens(2, 3, (0, 2, 2.0)), tokens(3, 5, (4, 5, 1.0))]
    planned = plan_segments(adapted, [], torch.zeros(0))
    assert planned is not None
    told = [(s.token_start, s.token_end, s.row_start, s.coefficients.tolist()) for s in planned.adapted]
    assert told == [(0, 3, 0, [[0.5, 0.5], [0.5, 0.5], [2.0, 2.0]]), (3, 5, 4, [[1.0]])]


def test_coefficients_have_the_dtype_that_computes() -> None:
    (span,) = plan_spans([tokens(0, 1, (0, 1, 1.0))], dtype=torch.bfloat16, device=CPU)
    assert span.coefficients.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("field", "is_segments_only"),
    [("segments", True), ("spans", False), ("fused", False), ("items", False), ("whole_modules", False)],
)
def test_plan_is_left_to_native_kernels_alone_if_it_has_nothing_but_segments(
    field: str, is_segments_only: bool
) -> None:
    assert RowPlan(1).is_segments_only and RowPlan(1).is_empty
    plan = RowPlan(1, **{field: (object(),)})
    assert (plan.is_segments_only, plan.is_empty) == (is_segments_only, False)


def test_cost_grows_with_both_sides() -> None:
    assert span_cost(0, 0) < span_cost(1, 1) < span_cost(2, 1) < span_cost(2, 2)


POOL = [(0, 3), (3, 4), (4, 9), (11, 13), (40, 41)]  # rank rows of five adapters, with gaps


@st.composite
def batches(draw: st.DrawFn) -> tuple[int, list[AdaptedTokens]]:
    """Requests of 1 to 40 tokens, base, with one adapter or several, in any order; and the number of tokens."""
    adapted, start = [], 0
    for _ in range(draw(st.integers(1, 9))):
        end = start + draw(st.sampled_from([1, 1, 1, 2, 5, 40]))
        members = draw(st.lists(st.sampled_from(POOL), max_size=3))
        scales = st.sampled_from([1.0, 0.5, -2.0, 0.0])
        if members:
            adapted.append(tokens(start, end, *((*rows, draw(scales)) for rows in members)))
        start = end
    return start, adapted


@settings(max_examples=60, deadline=None)
@given(batch=batches(), seed=st.integers(0, 1000))
def test_spans_give_the_reference_delta(batch: tuple[int, list[AdaptedTokens]], seed: int) -> None:
    num_tokens, adapted = batch
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, 6, generator=generator)
    a, b = torch.randn(41, 6, generator=generator), torch.randn(41, 5, generator=generator)
    a0 = torch.randn(41, generator=generator)
    spans = plan(*adapted)
    y = torch.zeros(num_tokens, 5)
    for span in spans:
        here, rows = slice(span.token_start, span.token_end), slice(span.row_start, span.row_end)
        u = weigh_(shrink(x[here], a[rows], a0[rows]), span.coefficients, span.left_out)
        expand_(y[here], u, b[rows])
    coefficients = torch.zeros(num_tokens, 41)
    for request in adapted:
        for owned in request.rows:
            coefficients[request.start : request.end, owned.start : owned.end] += owned.coefficient
    torch.testing.assert_close(y, reference_delta(x, a, a0, b, coefficients), atol=1e-4, rtol=1e-4)
    assert all(left.token_end <= right.token_start for left, right in pairwise(spans))


def test_float16_is_for_segments_however_many_tokens_there_are() -> None:
    """A step that had torch's products for some of them gave others' tokens other bits."""
    like = torch.empty(0, dtype=torch.float16)
    assert suits_segment(100_000, 256, like) == can_add(like)
