"""Products with weights of 8 and 4 bits against their definition, in float64."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.linear_product import LinearProduct, PanelEmbedding
from fusionserve.kernels.quantized_linear import (
    GROUP,
    QuantizedLinear,
    can_quantize,
    has_quantized_product,
    in_eight_bits,
    quantize,
)

SIZES = [(32, 16), (64, 32), (96, 48), (128, 64), (576, 80), (160, 192), (64, 5), (96, 83)]  # (d_in, d_out)
BITS = [8, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-2},
    torch.float16: {"rtol": 2**-10, "atol": 1e-3},
}

needs_product = pytest.mark.skipif(
    not has_quantized_product(), reason="the processor has no product of bytes"
)


def make_linear(
    d_in: int, d_out: int, bits: int, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> tuple[QuantizedLinear, Tensor]:
    torch.manual_seed(d_in)
    weight = (torch.randn(d_out, d_in) * d_in**-0.5).to(dtype)
    return quantize(weight, torch.randn(d_out).to(dtype) if bias else None, bits), weight


def definition(x: Tensor, linear: QuantizedLinear) -> Tensor:
    """W x + b in float64, of the weight and the inputs in few bits."""
    y = functional.linear(in_eight_bits(x).double(), exact_weight(linear))
    return y if linear.bias is None else y + linear.bias.double()


@lru_cache(maxsize=1)
def exact_weight(linear: QuantizedLinear) -> Tensor:
    """The levels times their scales, one by one."""
    weight = torch.zeros(linear.out_features, linear.in_features, dtype=torch.float64)
    middle = 1 << linear.bits - 1
    for output in range(linear.out_features):
        panel, place = divmod(output, 16)
        for group in range(linear.in_features // GROUP):
            levels = linear.levels[panel, group, :, place].int()
            if linear.bits == 4:
                levels = torch.cat([torch.cat((four & 15, four >> 4)) for four in levels])
            here = slice(group * GROUP, (group + 1) * GROUP)
            weight[output, here] = (levels.flatten() - middle).double() * linear.scales[
                panel, group, place
            ].double()
    return weight


@pytest.mark.parametrize(("d_in", "d_out"), SIZES[:4])
@pytest.mark.parametrize("bits", BITS)
def test_weight_is_near_and_every_level_is_used(d_in: int, d_out: int, bits: int) -> None:
    linear, weight = make_linear(d_in, d_out, bits)
    assert torch.equal(linear.weight.double(), exact_weight(linear))
    steps = linear.scales.float().abs().movedim(-1, 1).reshape(d_out, -1)  # one step of each group
    error = (linear.weight - weight).abs().view(d_out, -1, GROUP)
    # Half a step; at the end that the furthest number does not stand at, or where its scale was rounded, up to one.
    assert float((error / steps[..., None]).max()) <= (1.0 if bits == 8 else 1.01)
    assert float((error / steps[..., None]).mean()) < 0.27


@pytest.mark.parametrize("bits", BITS)
def test_zeros_stay_zeros(bits: int) -> None:
    linear = quantize(torch.zeros(16, 64), None, bits)
    assert torch.equal(linear.weight, torch.zeros(16, 64))
    assert torch.equal(linear(torch.ones(3, 64)), torch.zeros(3, 16))


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_product), False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_product_equals_the_definition(
    d_in: int, d_out: int, bits: int, dtype: torch.dtype, native: bool
) -> None:
    linear, _ = make_linear(d_in, d_out, bits, dtype)
    for num_tokens in (*range(1, 10), 15, 18, 19, 20):
        x = torch.randn(num_tokens, d_in).to(dtype)
        found = linear(x) if native else linear.reference(x)
        torch.testing.assert_close(found.double(), definition(x, linear), **TOLERANCES[dtype])


@needs_product
@pytest.mark.parametrize("bits", BITS)
def test_parts_share_one_call_a_strided_input_and_a_residual(bits: int) -> None:
    parts = [make_linear(64, d_out, bits)[0] for d_out in (16, 80, 48)]
    x = torch.randn(9, 128)[:, :64]
    product = LinearProduct.of(parts)
    assert product is not None
    for output, linear in zip(product(x), parts, strict=True):
        torch.testing.assert_close(output.double(), definition(x, linear), rtol=1e-5, atol=1e-5)
    residual = torch.randn(9, 16) * 100
    expected = residual.double() + definition(x, parts[0])
    LinearProduct(parts[:1]).add_(x, residual)
    torch.testing.assert_close(residual.double(), expected, rtol=1e-6, atol=1e-4)


@needs_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_token_gets_the_same_bits_in_any_company(bits: int, dtype: torch.dtype) -> None:
    linear, _ = make_linear(576, 192, bits, dtype)
    x = torch.randn(45, 576).to(dtype)
    alone = torch.cat([linear(x[index : index + 1]) for index in range(len(x))])
    assert torch.equal(linear(x), alone)


@needs_product
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", BITS)
def test_what_is_not_finite_stays_so_and_is_the_tokens_own(bits: int, number: float) -> None:
    linear, _ = make_linear(64, 32, bits)
    x = torch.randn(6, 64)
    expected = linear(x)
    x[4, 40] = number
    found = linear(x)
    assert not found[4].isfinite().any()
    assert torch.equal(found[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]])


@needs_product
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_inputs_too_small_for_a_scale_are_zeros(bits: int, dtype: torch.dtype) -> None:
    linear, _ = make_linear(64, 32, bits, dtype, bias=False)
    x = torch.zeros(2, 64, dtype=dtype)
    x[0, :32], x[1, 32:] = 1e-38, 1.0
    found = linear(x)
    assert not found[0].any()
    torch.testing.assert_close(found.double(), definition(x, linear), rtol=2**-7, atol=1e-3)
    assert torch.equal(linear.reference(x)[0], found[0])


def test_kinds_do_not_join() -> None:
    assert LinearProduct.of([make_linear(64, 32, 8)[0], make_linear(64, 32, 4)[0]]) is None
    assert LinearProduct.of([make_linear(64, 32, 8)[0], torch.nn.Linear(64, 32)]) is None


def test_tied_embedding_reads_the_rows_that_the_head_computes_with() -> None:
    head, _ = make_linear(64, 83, 8, torch.bfloat16, bias=False)
    token_ids = torch.tensor([[0, 82, 17, 16]])
    assert torch.equal(PanelEmbedding(head)(token_ids), functional.embedding(token_ids, head.weight))
    assert head.weight.dtype == torch.bfloat16


def test_only_what_divides_is_quantized() -> None:
    assert can_quantize(torch.zeros(15, 32))
    assert not can_quantize(torch.zeros(16, 48))
