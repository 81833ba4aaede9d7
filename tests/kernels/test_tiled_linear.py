"""Products with weights of 8 and 4 bits in Triton, in its interpreter without a GPU, against their definition."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from device_kernels import DEVICE
from torch import Tensor
from torch.nn import functional

from fusionserve.kernels.device import few_bits_launch
from fusionserve.kernels.linear_product import LinearProduct, PanelEmbedding
from fusionserve.kernels.quantized_linear import GROUP, in_eight_bits, quantize
from fusionserve.kernels.tiled_linear import TiledLinear, quantize_on

pytestmark = pytest.mark.gpu

# (d_in, d_out): groups that fill no line of 4 bits, outputs that fill no block, sums in two and four ranges.
SIZES = [(32, 16), (96, 48), (576, 80), (160, 144), (544, 272), (1056, 16), (96, 45)]
NUM_TOKENS = [1, 3, 16, 17, 70]  # tiles of 16, of 32 and of 64, full or not; the last are two
BITS = [8, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

with_bits = pytest.mark.parametrize("bits", BITS)
# Types differ in how inputs are read and sums are written: sizes of one range, of two and of four show all of it.
PRODUCTS = [(size, torch.float32) for size in SIZES]
PRODUCTS += [(size, dtype) for size in ((96, 48), (544, 272), (1056, 16)) for dtype in DTYPES[1:]]

with_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_weight(d_in: int, d_out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A weight, and a bias."""
    generator = torch.Generator().manual_seed(d_in)
    weight = torch.randn(d_out, d_in, generator=generator) * d_in**-0.5
    return weight.to(dtype), torch.randn(d_out, generator=generator).to(dtype)


def make_linear(
    d_in: int, d_out: int, bits: int, dtype: torch.dtype = torch.float32, *, bias: bool = True
) -> TiledLinear:
    weight, own_bias = make_weight(d_in, d_out, dtype)
    return quantize_on(DEVICE, weight, own_bias if bias else None, bits)


def make_inputs(num_tokens: int, d_in: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(num_tokens, d_in, generator=torch.Generator().manual_seed(num_tokens))
    return x.to(DEVICE, dtype)


def definition(x: Tensor, linear: TiledLinear) -> Tensor:
    """W x + b in float64, of the weight and the inputs in few bits; the weight as the CPU's panels hold it."""
    weight, bias = make_weight(linear.in_features, linear.out_features, x.dtype)
    panels = quantize(weight, None, linear.bits)
    exact = panels._exact_rows(torch.arange(linear.out_features)).double()
    y = functional.linear(in_eight_bits(x.cpu()).double(), exact)
    return y if linear.bias is None else y + bias.double()


def assert_near(found: Tensor, expected: Tensor) -> None:
    # Half a step of the last digit; the interpreter cuts off what bfloat16 does not hold.
    tolerance = {torch.bfloat16: 2**-7, torch.float16: 2**-11, torch.float32: 2e-6}[found.dtype]
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1.01 * tolerance, atol=2e-6)


@contextmanager
def one_program_for_all_ranges(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if so many tokens shared the batch that no sum need be shared by programs."""
    with monkeypatch.context() as patch:
        patch.setattr(few_bits_launch, "is_shared", lambda *_: False)
        yield


@with_bits
@pytest.mark.parametrize(("d_in", "d_out"), SIZES)
def test_weight_is_that_of_the_panels(d_in: int, d_out: int, bits: int) -> None:
    weight, _ = make_weight(d_in, d_out)
    assert torch.equal(make_linear(d_in, d_out, bits).weight.cpu(), quantize(weight, None, bits).weight)


@with_dtype
def test_inputs_are_rounded_as_defined(dtype: torch.dtype) -> None:
    x = make_inputs(5, 33 * GROUP, dtype)
    x[1, :GROUP] = torch.arange(GROUP) - 15.5  # with 127 / 127 a step, ties, which go to the even
    x[1, 0] = 127
    x[2, GROUP : 2 * GROUP] = 0.0
    x[3, :GROUP] = 1e-38  # too small for a scale
    levels, scales = few_bits_launch._rounded(x, 33)
    found = (levels.float() * scales[..., None]).movedim(0, 1).flatten(1)
    assert torch.equal(found, in_eight_bits(x))
    assert levels.movedim(0, 1)[1, 0, 14:18].tolist() == [-2, 0, 0, 2]


@with_bits
@pytest.mark.parametrize(("size", "dtype"), PRODUCTS, ids=str)
def test_product_equals_the_definition(size: tuple[int, int], dtype: torch.dtype, bits: int) -> None:
    linear = make_linear(*size, bits, dtype)
    for num_tokens in NUM_TOKENS:
        x = make_inputs(num_tokens, size[0], dtype)
        assert_near(linear(x), definition(x, linear))


@with_bits
def test_product_without_a_bias(bits: int) -> None:
    linear = make_linear(544, 80, bits, bias=False)
    x = make_inputs(3, 544)
    assert_near(linear(x), definition(x, linear))


@with_bits
@with_dtype
def test_parts_share_one_call_a_strided_input_and_a_residual(bits: int, dtype: torch.dtype) -> None:
    parts = [make_linear(544, d_out, bits, dtype, bias=d_out != 80) for d_out in (16, 272, 80)]
    x = make_inputs(9, 1088, dtype)[:, :544]
    product = LinearProduct.of(parts)
    assert product is not None
    for output, linear in zip(product(x), parts, strict=True):
        assert_near(output, definition(x, linear))
    residual = make_inputs(9, 16, dtype) * 100
    expected = residual.cpu().double() + definition(x, parts[0])
    LinearProduct.of(parts[:1]).add_(x, residual)
    assert_near(residual, expected)


@with_bits
def test_token_gets_the_same_bits_in_any_company(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = make_linear(1056, 144, bits)  # sums of four ranges
    x = make_inputs(70, 1056)
    crowd = linear(x)
    for token in (0, 15, 16, 32, 63, 64, 69):
        assert torch.equal(linear(x[token : token + 1])[0], crowd[token])
    for num_tokens in (16, 17, 33, 64):
        assert torch.equal(linear(x[:num_tokens]), crowd[:num_tokens])
    with one_program_for_all_ranges(monkeypatch):
        assert torch.equal(linear(x), crowd)
        assert torch.equal(linear(x[:3]), crowd[:3])


def test_sums_are_shared_by_what_the_weights_are() -> None:
    def splits(d_in: int, *d_outs: int) -> int:
        parts = [empty(d_in, d_out) for d_out in d_outs]
        return few_bits_launch.FewBitsWeights.of(parts).splits

    def empty(d_in: int, d_out: int) -> TiledLinear:
        panels, groups = d_out // 16, d_in // GROUP
        storage = torch.empty(panels, groups, 16, 32, dtype=torch.int8), torch.empty(panels, groups, 16)
        return TiledLinear(*storage, None, out_features=d_out, bits=8, dtype=torch.bfloat16)

    assert splits(4096, 4096, 1024, 1024) == splits(4096, 4096) == splits(14336, 4096) == 8
    assert splits(4096, 14336, 14336) == 2
    assert splits(4096, 128256) == splits(32, 16) == 1
    assert splits(512, 16) == 2 and splits(480, 16) == 1


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@with_bits
def test_what_is_not_finite_stays_so_and_is_the_tokens_own(bits: int, number: float) -> None:
    linear = make_linear(96, 32, bits)
    x = make_inputs(6, 96)
    expected = linear(x)
    x[4, 40] = number
    found = linear(x)
    assert not found[4].isfinite().any()
    assert torch.equal(found[[0, 1, 2, 3, 5]], expected[[0, 1, 2, 3, 5]])


def test_no_tokens_are_no_launch() -> None:
    assert make_linear(32, 16, 8)(make_inputs(0, 32)).shape == (0, 16)


def test_kinds_do_not_join() -> None:
    eight, four = make_linear(64, 32, 8), make_linear(64, 32, 4)
    assert LinearProduct.of([eight, four]) is None
    assert LinearProduct.of([eight, quantize(make_weight(64, 32)[0], None, 8)]) is None
    assert LinearProduct.of([eight, torch.nn.Linear(64, 32)]) is None


def test_tied_embedding_reads_the_rows_that_the_head_computes_with() -> None:
    head = make_linear(96, 80, 8, torch.bfloat16, bias=False)
    token_ids = torch.tensor([[0, 79, 17, 16]], device=DEVICE)
    assert torch.equal(PanelEmbedding(head)(token_ids), functional.embedding(token_ids, head.weight))
    assert head.weight.dtype == torch.bfloat16
