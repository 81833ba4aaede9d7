"""Shrink and expand against the definition, token by token and rank row by rank row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusionserve.kernels.low_rank import expand_, reference_delta, shrink, shrink_embedding, weigh_, zeros_of

D_IN, D_OUT = 6, 9


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reference_is_the_sum_of_the_matrices() -> None:
    x, a, b = random(4, D_IN), random(3, D_IN, seed=1), random(3, D_OUT, seed=2)
    bias, c = random(3, seed=3), random(4, 3, seed=4)
    expected = torch.stack([(x[t] @ a.T + bias) * c[t] @ b for t in range(4)])
    torch.testing.assert_close(reference_delta(x, a, bias, b, c), expected)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 7),
    num_rows=st.integers(1, 8),
    is_shared=st.booleans(),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_shrink_weigh_expand_is_the_definition(
    num_tokens: int, num_rows: int, is_shared: bool, seed: int, data: st.DataObject
) -> None:
    x, a, b = random(num_tokens, D_IN, seed=seed), random(num_rows, D_IN), random(num_rows, D_OUT, seed=1)
    bias, y = random(num_rows, seed=2), random(num_tokens, D_OUT, seed=3)
    own = data.draw(
        st.lists(
            st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5]), min_size=num_rows, max_size=num_rows),
            min_size=1 if is_shared else num_tokens,
            max_size=1 if is_shared else num_tokens,
        )
    )
    c = torch.tensor(own, dtype=torch.float64)
    expected = y + reference_delta(x, a, bias, b, c.expand(num_tokens, -1))
    expand_(y, weigh_(shrink(x, a, bias), c, zeros_of(c)), b)
    torch.testing.assert_close(y, expected)


def test_embedding_is_the_shrink_of_one_hot_inputs() -> None:
    token_ids = torch.tensor([4, 0, 4, 5])
    a, bias = random(3, D_IN), random(3, seed=1)
    one_hot = torch.nn.functional.one_hot(token_ids, D_IN).double()
    torch.testing.assert_close(shrink_embedding(token_ids, a, bias), shrink(one_hot, a, bias))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_overflow_of_one_adapter_stays_out_of_its_neighbours_tokens(bad: float) -> None:
    u = torch.tensor([[bad, 2.0], [bad, 3.0]])
    c = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    weighted = weigh_(u, c, zeros_of(c))
    assert weighted[1].tolist() == [0.0, 1.5]
    y = torch.zeros(2, D_OUT)
    expand_(y, weighted, random(2, D_OUT).float())
    assert not y[0].isfinite().all()
    torch.testing.assert_close(y[1], 1.5 * random(2, D_OUT)[1].float())


def test_tokens_without_rows_are_left_exactly_as_they_are() -> None:
    y = random(3, D_OUT).float()
    before = y.clone()
    zeros = torch.zeros(1, 4)
    expand_(y, weigh_(random(3, 4).float(), zeros, zeros_of(zeros)), random(4, D_OUT).float())
    assert torch.equal(y, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_keep_the_dtype(dtype: torch.dtype) -> None:
    x, a, bias = random(2, D_IN).to(dtype), random(3, D_IN).to(dtype), random(3).to(dtype)
    u = shrink(x, a, bias)
    assert u.dtype == dtype
    for wide in (dtype, torch.float32):  # a fusion's coefficients are float32
        assert weigh_(u, torch.ones(1, 3, dtype=wide), None).dtype == dtype


def test_shrink_without_a_bias_is_that_with_zeros() -> None:
    x, a = random(4, D_IN), random(3, D_IN, seed=1)
    torch.testing.assert_close(shrink(x, a, None), shrink(x, a, torch.zeros(3, dtype=torch.float64)))


def test_nothing_is_left_out_without_zeros() -> None:
    assert zeros_of(torch.tensor([[0.5, -2.0]])) is None
    left_out = zeros_of(torch.tensor([[0.5, 0.0]]))
    assert left_out is not None
    assert left_out.tolist() == [[False, True]]
