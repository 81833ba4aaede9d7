"""Log-probabilities: the native kernel and torch's operations against log softmax in float64."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fusionserve.kernels.native_library import native_library
from fusionserve.kernels.token_logprobs import LogprobTensors, reference_token_logprobs, token_logprobs

Telling = Callable[[Tensor, Sequence[int], Sequence[int], int], LogprobTensors]
BOTH = pytest.mark.parametrize("telling", [token_logprobs, reference_token_logprobs])


def make_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    logits = 3.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    logits[:, 0] = -math.inf
    return logits


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [2, 15, 16, 33, 49_152])
@pytest.mark.parametrize("num_top", [0, 1, 7, 20])
def test_logprobs_ranks_and_the_most_likely_are_the_definitions(
    num_top: int, vocab: int, dtype: torch.dtype, telling: Telling
) -> None:
    logits = make_logits(4, vocab).to(dtype)
    rows, token_ids = [2, 0, 2, 3, 1], [vocab - 1, 1, 1, 0, vocab // 2]
    found = telling(logits, rows, token_ids, num_top)
    expected = torch.log_softmax(logits.double(), dim=-1)[rows]
    chosen = expected.gather(1, torch.tensor(token_ids)[:, None])[:, 0]
    torch.testing.assert_close(found.logprobs.double(), chosen, atol=2e-6, rtol=1e-6)
    wide = logits.float()[rows]
    assert found.ranks.tolist() == [
        1 + int((values > values[token]).sum()) for values, token in zip(wide, token_ids, strict=True)
    ]
    top = expected.topk(min(num_top, vocab), dim=-1).values
    torch.testing.assert_close(found.top.double(), top, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(expected.gather(1, found.top_ids), top)
    assert all(len(set(ids)) == min(num_top, vocab) for ids in found.top_ids.tolist())


@pytest.mark.skipif(native_library() is None, reason="torch's operations promise no order")
def test_of_equal_tokens_the_first_ones_are_told() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 50] = 1.0
    assert token_logprobs(logits, [0], [3], 4).top_ids.tolist() == [[50, 0, 1, 2]]


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_that_is_not_finite_has_none_and_leaves_the_others(bad: float, telling: Telling) -> None:
    logits = make_logits(3, 200)
    clean = telling(logits, [0, 2], [5, 5], 3)
    logits[1, 7] = bad
    found = telling(logits, [0, 1, 2], [5, 5, 5], 3)
    assert found.logprobs[1].isnan() and found.top[1].isnan().all()
    for before, after in zip(clean, found, strict=True):
        assert torch.equal(before, after[[0, 2]])
