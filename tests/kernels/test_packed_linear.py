"""The packed product against the definition, and that a token's output does not depend on its company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fusionserve.kernels.linear_product import LinearProduct, PanelEmbedding
from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.packed_linear import (
    PackedLinear,
    can_pack,
    pack,
    reference_linear,
    unpack,
)

# (d_in, d_out); the last panel is filled up where there are no 16 outputs for it
SIZES = [
    (2, 16),
    (64, 16),
    (66, 48),
    (128, 80),
    (130, 80),
    (576, 192),
    (96, 208),
    (66, 5),
    (64, 83),
    (578, 161),
]

# Of one rounding: half a step of the last digit; of float32 that of the sums.
TOLERANCES = {
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-4},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
}
with_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)

library = native_library()
needs_product = pytest.mark.skipif(
    library is None or not library.has_packed_linear(), reason="the processor has no packed product"
)


def make_weight(d_in: int, d_out: int, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(d_in)
    return (torch.randn(d_out, d_in) * d_in**-0.5).to(dtype)


def make_linear(
    d_in: int, d_out: int, dtype: torch.dtype, *, bias: bool = True
) -> tuple[PackedLinear, Tensor]:
    weight = make_weight(d_in, d_out, dtype)
    return PackedLinear(weight, torch.randn(d_out).to(dtype) if bias else None), weight


@with_dtype
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_unpack_undoes_pack(d_in: int, d_out: int, dtype: torch.dtype) -> None:
    weight = make_weight(d_in, d_out, dtype)
    assert torch.equal(unpack(pack(weight), d_out), weight)


@needs_product
@with_dtype
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 7, 8, 13, 16, 17, 32, 40, 65])
def test_product_equals_the_definition(
    d_in: int, d_out: int, bias: bool, num_tokens: int, dtype: torch.dtype
) -> None:
    linear, weight = make_linear(d_in, d_out, dtype, bias=bias)
    x = torch.randn(num_tokens, d_in).to(dtype)
    expected = reference_linear(x, weight, linear.bias)
    torch.testing.assert_close(linear(x), expected.to(dtype), **TOLERANCES[dtype])


@needs_product
@with_dtype
def test_parts_share_one_call_and_a_strided_input(dtype: torch.dtype) -> None:
    parts = [make_linear(66, d_out, dtype) for d_out in (16, 75, 48)]
    x = torch.randn(9, 132).to(dtype)[:, :66]
    outputs = LinearProduct([linear for linear, _ in parts])(x)
    for output, (linear, weight) in zip(outputs, parts, strict=True):
        expected = reference_linear(x, weight, linear.bias)
        torch.testing.assert_close(output, expected.to(dtype), **TOLERANCES[dtype])


@needs_product
@with_dtype
def test_residual_is_added_before_rounding(dtype: torch.dtype) -> None:
    linear, weight = make_linear(64, 45, dtype)
    x, residual = torch.randn(5, 64).to(dtype), torch.randn(5, 45).to(dtype) * 100
    expected = residual.float() + reference_linear(x, weight, linear.bias)
    LinearProduct([linear]).add_(x, residual)
    torch.testing.assert_close(residual, expected.to(dtype), **{**TOLERANCES[dtype], "atol": 1e-5})


@needs_product
@with_dtype
@pytest.mark.parametrize("d_in", [576, 578])
def test_token_gets_the_same_bits_in_any_company(d_in: int, dtype: torch.dtype) -> None:
    linear, _ = make_linear(d_in, 203, dtype)
    x = torch.randn(45, d_in).to(dtype)
    alone = torch.cat([linear(x[index : index + 1]) for index in range(len(x))])
    for size in (*range(2, 25), 30, 45):
        together = torch.cat([linear(some) for some in x.split(size)])
        assert torch.equal(together, alone), size


@needs_product
@with_dtype
@pytest.mark.parametrize("d_in", [576, 1536])
def test_token_gets_the_same_bits_among_many(d_in: int, dtype: torch.dtype) -> None:
    """Where threads have tokens of their own, and sums of a part of the depth are kept aside."""
    parts = [make_linear(d_in, d_out, dtype)[0] for d_out in (203, 64, 16)]
    product = LinearProduct(parts)
    x, residual = torch.randn(1100, d_in).to(dtype), torch.randn(1100, 203).to(dtype)
    alone = [torch.cat(outputs) for outputs in zip(*map(product, x.split(16)), strict=True)]
    for size in (150, 600, 1100):
        together = [torch.cat(outputs) for outputs in zip(*map(product, x.split(size)), strict=True)]
        assert all(map(torch.equal, together, alone)), size
    added = residual.clone()
    for some, onto in zip(x.split(16), residual.split(16), strict=True):
        LinearProduct(parts[:1]).add_(some, onto)
    LinearProduct(parts[:1]).add_(x, added)
    assert torch.equal(added, residual)


@needs_product
@with_dtype
def test_tied_embedding_reads_the_packed_rows(dtype: torch.dtype) -> None:
    head, weight = make_linear(66, 83, dtype, bias=False)
    token_ids = torch.tensor([[0, 82, 17, 16]])
    expected = nn.functional.embedding(token_ids, weight)
    assert torch.equal(PanelEmbedding(head)(token_ids), expected)
    assert torch.equal(PanelEmbedding(head, 5.65625)(token_ids), expected * 5.65625)


@needs_product
@with_dtype
def test_what_is_not_finite_is_the_tokens_own(dtype: torch.dtype) -> None:
    linear, _ = make_linear(64, 48, dtype, bias=False)
    x = torch.zeros(3, 64, dtype=dtype)
    x[1, 5] = float("inf")
    found = linear(x)
    assert not found[[0, 2]].any() and not found[1].isfinite().all()


def test_only_what_fits_is_packed() -> None:
    assert not can_pack(torch.zeros(16, 4, dtype=torch.float64))
    assert not can_pack(torch.zeros(16, 3, dtype=torch.bfloat16))
