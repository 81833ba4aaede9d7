"""Routed experts in one native call against the definition; a token's output does not depend on its company."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.activations import Activation
from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.panel_experts import PanelExperts, can_be_in_panels
from fusionserve.kernels.quantized_linear import has_quantized_product

library = native_library()
pytestmark = pytest.mark.skipif(
    library is None or not library.has_packed_linear(), reason="the processor has no packed product"
)
needs_bytes = pytest.mark.skipif(not has_quantized_product(), reason="the processor has no product of bytes")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
NUM_EXPERTS, HIDDEN, INNER, PER_TOKEN = 6, 96, 64, 3

with_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def make_experts(
    dtype: torch.dtype, activation: Activation = Activation.SILU, bits: int | None = None
) -> PanelExperts:
    torch.manual_seed(0)
    gate_up = torch.randn(NUM_EXPERTS, 2 * INNER, HIDDEN) * HIDDEN**-0.5
    down = torch.randn(NUM_EXPERTS, HIDDEN, INNER) * INNER**-0.5
    return PanelExperts(gate_up.to(dtype), down.to(dtype), activation, bits)


def make_input(num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, and for each of them some experts and their weights; expert 4 is nobody's."""
    torch.manual_seed(num_tokens)
    scores = torch.randn(num_tokens, NUM_EXPERTS)
    scores[:, 4] = -torch.inf
    chosen = scores.topk(PER_TOKEN).indices
    return torch.randn(num_tokens, HIDDEN).to(dtype), chosen, torch.rand(num_tokens, PER_TOKEN)


@with_dtype
@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU_TANH, Activation.GELU])
@pytest.mark.parametrize("num_tokens", [1, 2, 7, 16, 40, 130])
def test_output_equals_the_definition(num_tokens: int, activation: Activation, dtype: torch.dtype) -> None:
    experts = make_experts(dtype, activation)
    x, chosen, weights = make_input(num_tokens, dtype)
    expected = experts.reference(x.double(), chosen, weights.double())
    error = TOLERANCES[dtype]
    torch.testing.assert_close(experts(x, chosen, weights).double(), expected, rtol=error, atol=2 * error)


@needs_bytes
@with_dtype
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_output_of_few_bits_is_near_the_definition(num_tokens: int, bits: int, dtype: torch.dtype) -> None:
    """Not equal: an input of `down` in 8 bits may be the next level for a last digit."""
    experts = make_experts(dtype, bits=bits)
    x, chosen, weights = make_input(num_tokens, dtype)
    expected = experts.reference(x, chosen, weights)
    error = (experts(x, chosen, weights).double() - expected.double()).norm() / expected.double().norm()
    assert error < (2e-3 if dtype is torch.float32 else 1e-2)


@needs_bytes
@pytest.mark.parametrize(("bits", "limit"), [(8, 0.02), (4, 0.2)])
def test_few_bits_are_near_the_weights(bits: int, limit: float) -> None:
    given = make_input(40, torch.float32)
    full, few = make_experts(torch.float32)(*given), make_experts(torch.float32, bits=bits)(*given)
    assert 1e-4 < (full - few).norm() / full.norm() < limit


@with_dtype
@pytest.mark.parametrize(
    "bits", [None, pytest.param(8, marks=needs_bytes), pytest.param(4, marks=needs_bytes)]
)
def test_token_gets_the_same_bits_in_any_company(bits: int | None, dtype: torch.dtype) -> None:
    experts, given = make_experts(dtype, bits=bits), make_input(70, dtype)
    together = experts(*given)
    for size in (1, 3, 16, 33):
        parts = zip(*(tensor.split(size) for tensor in given), strict=True)
        assert torch.equal(torch.cat([experts(*part) for part in parts]), together), size


def test_numbers_of_no_expert_stand_for_none() -> None:
    experts = make_experts(torch.float32)
    x, chosen, weights = make_input(5, torch.float32)
    expected = experts(x, chosen, weights.clone().index_fill_(1, torch.tensor([1]), 0.0))
    for number in (-1, NUM_EXPERTS):
        torch.testing.assert_close(
            experts(x, chosen.index_fill(1, torch.tensor([1]), number), weights), expected
        )
    nobodys = torch.full_like(chosen, NUM_EXPERTS)
    assert not experts(x, nobodys, weights).any()


def test_what_is_not_finite_is_the_tokens_own() -> None:
    experts = make_experts(torch.float32)
    x, chosen, weights = make_input(9, torch.float32)
    expected = experts(x, chosen, weights)
    x[3] = torch.nan
    found = experts(x, chosen, weights)
    assert found[3].isnan().all()
    others = [token for token in range(9) if token != 3]
    assert torch.equal(found[others], expected[others])


def test_only_what_fits_is_in_panels() -> None:
    assert can_be_in_panels(torch.zeros(2, 32, 48), torch.zeros(2, 48, 16), None)
    for gate_up, down in (((2, 32, 48), (2, 48, 24)), ((2, 16, 48), (2, 48, 8)), ((2, 32, 40), (2, 40, 16))):
        assert not can_be_in_panels(torch.zeros(gate_up), torch.zeros(down), None)
    assert not can_be_in_panels(torch.zeros(2, 32, 48).double(), torch.zeros(2, 48, 16).double(), None)


@needs_bytes
def test_only_what_divides_into_groups_is_quantized() -> None:
    assert can_be_in_panels(torch.zeros(2, 64, 96), torch.zeros(2, 96, 32), 8)
    for gate_up, down in (((2, 32, 96), (2, 96, 16)), ((2, 64, 48), (2, 48, 32))):
        assert not can_be_in_panels(torch.zeros(gate_up), torch.zeros(down), 8)
