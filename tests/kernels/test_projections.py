"""The product of a group with what segments add to it, against the two apart and against itself in other company."""

from __future__ import annotations

import pytest
import torch
from kernel_rows import as_kernels_take
from torch import Tensor

from fusionserve.kernels.linear_product import LinearProduct, PanelLinear
from fusionserve.kernels.packed_linear import PackedLinear, can_pack
from fusionserve.kernels.projections import project
from fusionserve.kernels.quantized_linear import quantize
from fusionserve.kernels.segments import Addition, Additions, PartRows, Segment, Segments

CAPACITY, D_IN, D_OUTS = 120, 608, (96, 139)
RESIDENTS = ((0, 16), (16, 6), (22, 40), (62, 52))  # first rows and numbers
DTYPE = torch.bfloat16

pytestmark = [
    pytest.mark.usefixtures("helpers"),
    pytest.mark.skipif(
        not can_pack(torch.zeros(16, 2, dtype=DTYPE)), reason="the processor has no packed product"
    ),
]
with_adds = pytest.mark.parametrize("adds", [False, True], ids=["to outputs", "onto a residual"])
with_bits = pytest.mark.parametrize("bits", [None, 8], ids=["bfloat16", "int8"])


def make(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_group(bits: int | None) -> list[PanelLinear]:
    weights = [make(d_out, D_IN, seed=d_out).to(DTYPE) * D_IN**-0.5 for d_out in D_OUTS]
    return [PackedLinear(w, None) if bits is None else quantize(w, None, bits) for w in weights]


def make_rows() -> list[PartRows]:
    """Row by row, as the definition has them."""
    shrink = make(CAPACITY, D_IN, seed=1).to(DTYPE) * D_IN**-0.5
    return [PartRows(shrink, None, make(CAPACITY, d_out, seed=2).to(DTYPE)) for d_out in D_OUTS]


def make_inputs(num_tokens: int) -> tuple[Tensor, list[Tensor]]:
    x = make(num_tokens, D_IN, seed=3).to(DTYPE)
    return x, [make(num_tokens, d_out, seed=4).to(DTYPE) for d_out in D_OUTS]


def segments_of(tokens: range) -> list[Segment]:
    """Each token has a resident, every fifth is base; neighbours in it are one segment, as in a plan."""
    whose = [None if token % 5 == 4 else RESIDENTS[token // 7 % len(RESIDENTS)] for token in tokens]
    segments: list[Segment] = []
    for place, resident in enumerate(whose):
        if resident is None:
            continue
        start, extent = resident
        first = place
        if segments and segments[-1].token_end == place and segments[-1].row_start == start:
            first = segments.pop().token_start
        coefficients = torch.full((1, extent), 0.3)
        segments.append(Segment(first, place + 1, start, start + extent, extent, coefficients))
    return segments


def projected(
    group: list[PanelLinear],
    rows: list[PartRows],
    x: Tensor,
    residual: list[Tensor],
    tokens: range,
    adds: bool,
) -> list[Tensor]:
    here = slice(tokens.start, tokens.stop)
    outputs = [y[here].clone() if adds else torch.full_like(y[here], float("nan")) for y in residual]
    additions = Additions([Addition({i: as_kernels_take(part, RESIDENTS) for i, part in enumerate(rows)})])
    project(LinearProduct(group), x[here], outputs, additions, Segments(segments_of(tokens), x), add=adds)
    return outputs


@with_adds
@with_bits
def test_projections_equal_product_and_segments_apart(bits: int | None, adds: bool) -> None:
    group, rows, num_tokens = make_group(bits), make_rows(), 150
    x, residual = make_inputs(num_tokens)
    found = projected(group, rows, x, residual, range(num_tokens), adds)
    for module, part, y, before in zip(group, rows, found, residual, strict=True):
        expected = module.reference(x).double() + (before.double() if adds else 0)
        for s in segments_of(range(num_tokens)):
            tokens, here = slice(s.token_start, s.token_end), slice(s.row_start, s.row_end)
            u = x[tokens].double() @ part.shrink[here].double().T
            expected[tokens] += (0.3 * u).to(DTYPE).double() @ part.expand[here].double()
        torch.testing.assert_close(y.double(), expected, rtol=2**-6, atol=0.03)


@with_adds
@with_bits
def test_token_gets_the_same_bits_in_any_company(bits: int | None, adds: bool) -> None:
    group, rows, num_tokens = make_group(bits), make_rows(), 300
    x, residual = make_inputs(num_tokens)
    together = projected(group, rows, x, residual, range(num_tokens), adds)
    for size in (1, 3, 16, 17, 90):
        for start in range(0, num_tokens - size, 61):
            some = range(start, start + size)
            for y, whole in zip(projected(group, rows, x, residual, some, adds), together, strict=True):
                assert torch.equal(y, whole[some.start : some.stop]), (size, start)
