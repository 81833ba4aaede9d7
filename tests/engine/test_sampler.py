"""The sampler against a plain reference in float64 and against transformers' own processors."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fusionserve.engine.sampler import (
    SamplerRow,
    choose,
    logprobs_of,
    sample,
)
from fusionserve.generation import SamplingParams
from fusionserve.kernels.token_draw import NUM_UNIFORMS

VOCAB = 40
GRID, STRIDE = 1597, 987  # neighbours in the Fibonacci series: an even grid over the first two splits
TOLERANCE = 5e-3
PROMPT = (1, 2, 3, 3)
GENERATED = (3, 4, 4, 4, 5)
BANNED = (7, 11)

PARAMETERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 5},
    "top_1": {"top_k": 1},
    "top_p": {"top_p": 0.7},
    "top_p_small": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p_all": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.7},
    "attraction": {"repetition_penalty": 0.6},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": -0.8},
    "bias": {"logit_bias": {0: 4.0, 9: -100.0, 39: 2.5}},
    "truncated": {"temperature": 0.8, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    "everything": {
        "temperature": 1.3,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {2: 1.5, 4: -0.5},
    },
}


def make_logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return 3.0 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def make_row(
    params: SamplingParams,
    uniform: float | Sequence[float] = 0.5,
    banned_ids: Sequence[int] = (),
    prompt_ids: Sequence[int] = PROMPT,
    generated_ids: Sequence[int] = GENERATED,
) -> SamplerRow:
    """One random number stands for all splits, several for the first ones."""
    some = (uniform,) if isinstance(uniform, float) else tuple(uniform)
    uniforms = (*some, *(some[-1],) * (NUM_UNIFORMS - len(some)))
    return SamplerRow(params, prompt_ids, generated_ids, banned_ids, uniforms)


def reference_logits(logits: Sequence[float], row: SamplerRow) -> list[float]:
    """Bias, penalties and bans, token by token."""
    params, changed = row.params, []
    for token_id, value in enumerate(logits):
        value += params.logit_bias.get(token_id, 0.0)
        if token_id in row.prompt_ids or token_id in row.generated_ids:
            penalty = params.repetition_penalty
            value = value / penalty if value > 0 else value * penalty
        count = list(row.generated_ids).count(token_id)
        value -= params.presence_penalty * (count > 0) + params.frequency_penalty * count
        changed.append(-math.inf if token_id in row.banned_ids else value)
    return changed


def reference_probabilities(logits: Sequence[float], row: SamplerRow) -> np.ndarray:
    """The distribution a row is drawn from: temperature, then top-k, top-p and min-p, by the definition."""
    params = row.params
    scaled = np.array(reference_logits(logits, row)) / params.temperature
    kept = np.argsort(-scaled, kind="stable")[: params.top_k or None]
    p = np.exp(scaled[kept] - scaled[kept[0]])
    p /= p.sum()
    reached = np.cumsum(p) - p
    is_kept = (reached < params.top_p) & (p >= params.min_p * p[0])
    is_kept[0] = True
    result = np.zeros(len(scaled))
    result[kept[is_kept]] = p[is_kept]
    return result / result.sum()


def frequencies(logits: Tensor, params: SamplingParams, **row_fields: Any) -> np.ndarray:
    """How often each token is drawn if the random numbers take each value of a fine grid once."""
    grid = [((n + 0.5) / GRID, (n * STRIDE % GRID + 0.5) / GRID) for n in range(GRID)]
    rows = [make_row(params, uniforms, **row_fields) for uniforms in grid]
    tokens = sample(logits.expand(GRID, -1), rows)
    assert None not in tokens
    return np.bincount(np.array(tokens), minlength=logits.shape[-1]) / GRID


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", PARAMETERS)
def test_distribution_is_the_references(name: str, seed: int) -> None:
    params = SamplingParams(**PARAMETERS[name])
    logits = make_logits(seed=seed)
    expected = reference_probabilities(logits[0].tolist(), make_row(params, banned_ids=BANNED))
    found = frequencies(logits, params, banned_ids=BANNED)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert not found[expected == 0].any()
    assert not found[list(BANNED)].any()


@pytest.mark.parametrize("name", ["repetition", "attraction", "everything"])
def test_penalties_of_negative_logits_are_the_references(name: str) -> None:
    params = SamplingParams(**PARAMETERS[name])
    logits = make_logits() / 3 - 4
    assert logits.max() < 0
    expected = reference_probabilities(logits[0].tolist(), make_row(params))
    np.testing.assert_allclose(frequencies(logits, params), expected, atol=TOLERANCE)


@pytest.mark.parametrize("seed", range(2))
def test_distribution_is_that_of_transformers_processors(seed: int) -> None:
    params = SamplingParams(temperature=0.9, top_k=15, top_p=0.85, min_p=0.03, repetition_penalty=1.4)
    logits = make_logits(seed=seed)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(15),
            TopPLogitsWarper(0.85),
            MinPLogitsWarper(0.03),
        ]
    )
    expected = torch.softmax(processors(torch.tensor([[*PROMPT, *GENERATED]]), logits.clone()), dim=-1)[0]
    assert 1 < (expected > 0).sum() < 15
    np.testing.assert_allclose(frequencies(logits, params), expected.numpy(), atol=TOLERANCE)


@pytest.mark.parametrize("name", PARAMETERS)
def test_greedy_takes_the_most_likely_token_after_penalties(name: str) -> None:
    params = replace(SamplingParams(**PARAMETERS[name]), temperature=0.0)
    logits = make_logits(rows=8, seed=1)
    rows = [make_row(params, uniform, BANNED) for uniform in np.linspace(0, 1, 8, endpoint=False).tolist()]
    expected = [
        int(np.argmax(reference_logits(values, row)))
        for values, row in zip(logits.tolist(), rows, strict=True)
    ]
    assert sample(logits, rows) == expected


def test_draws_with_random_numbers_pass_a_chi_square_test() -> None:
    params, num_draws = SamplingParams(temperature=1.5), 8_000
    logits = make_logits(seed=5)
    uniforms = np.random.default_rng(0).random((num_draws, NUM_UNIFORMS)).tolist()
    tokens = sample(logits.expand(num_draws, -1), [make_row(params, numbers) for numbers in uniforms])
    observed = np.bincount(np.array(tokens), minlength=VOCAB)
    expected = reference_probabilities(logits[0].tolist(), make_row(params)) * num_draws
    frequent = expected >= 5
    statistic = float((((observed - expected) ** 2) / expected)[frequent].sum())
    freedom = int(frequent.sum()) - 1
    assert freedom > 20
    assert statistic < freedom + 3.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("uniform", [0.0, 1e-300, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("name", PARAMETERS)
def test_extreme_random_numbers_draw_possible_tokens(name: str, uniform: float) -> None:
    row = make_row(SamplingParams(**PARAMETERS[name]), uniform, BANNED)
    logits = make_logits(seed=2)
    possible = np.flatnonzero(reference_probabilities(logits[0].tolist(), row))
    (token,) = sample(logits, [row])
    assert token in possible
    if uniform in (0.0, 1e-300):
        assert token == possible[0]
    elif uniform > 0.5:
        assert token == possible[-1]


def test_impossible_tokens_at_both_ends_are_never_drawn() -> None:
    logits = torch.full((1, 6), -math.inf)
    logits[0, 2:4] = 0.0
    for uniform, expected in ((0.0, 2), (0.4, 2), (0.6, 3), (1 - 2.0**-53, 3)):
        assert sample(logits, [make_row(SamplingParams(), uniform)]) == [expected]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-60])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = make_logits(rows=20, seed=3)
    uniforms = np.linspace(0, 0.999, 20).tolist()
    rows = [make_row(SamplingParams(temperature=temperature), uniform) for uniform in uniforms]
    assert sample(logits, rows) == logits.argmax(dim=-1).tolist()


def test_huge_temperature_is_nearly_uniform() -> None:
    found = frequencies(make_logits(seed=4), SamplingParams(temperature=100.0))
    np.testing.assert_allclose(found, 1 / VOCAB, rtol=0.15)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    rows = [make_row(SamplingParams(temperature=0.01), u, generated_ids=()) for u in (0.9, 0.9)]
    assert sample(logits, rows) == [0, 2]


@pytest.mark.parametrize("top_k", [VOCAB, VOCAB + 1, 1 << 31])
def test_top_k_of_the_whole_vocabulary_changes_nothing(top_k: int) -> None:
    logits = make_logits()
    np.testing.assert_array_equal(
        frequencies(logits, SamplingParams(top_k=top_k)), frequencies(logits, SamplingParams())
    )


def test_ties_at_the_threshold_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0]])
    assert (frequencies(logits, SamplingParams(top_k=2)) > 0).tolist() == [True, True, True, False]
    flat = torch.zeros(1, 4)
    assert (frequencies(flat, SamplingParams(top_p=0.3)) > 0).all()


def test_tiny_top_p_keeps_the_most_likely_token() -> None:
    logits = make_logits(rows=5, seed=6)
    rows = [make_row(SamplingParams(top_p=1e-12), uniform) for uniform in (0.0, 0.2, 0.5, 0.9, 0.999999)]
    assert sample(logits, rows) == logits.argmax(dim=-1).tolist()


def test_top_p_of_thousands_of_tokens_keeps_them_beside_rows_that_keep_few() -> None:
    logits = make_logits(seed=12, vocab=3000) / 30
    uniforms = np.random.default_rng(3).random((3000, NUM_UNIFORMS)).tolist()
    wide, narrow = SamplingParams(top_p=0.9), SamplingParams(top_p=0.05)
    batch = [make_row(wide, numbers) for numbers in uniforms]
    tokens = sample(logits.expand(3000, -1), batch)
    possible = set(np.flatnonzero(reference_probabilities(logits[0].tolist(), batch[0])).tolist())
    assert len(possible) > 2000
    assert set(tokens) <= possible and len(set(tokens)) > 1500
    mixed = [make_row(narrow, uniforms[0]), *batch[:5]]
    assert sample(logits.expand(6, -1), mixed) == [sample(logits, mixed[:1])[0], *tokens[:5]]
    unlimited = [make_row(SamplingParams(), numbers) for numbers in uniforms[:500]]
    beside = sample(logits.expand(501, -1), [mixed[0], *unlimited])
    assert beside[1:] == sample(logits.expand(500, -1), unlimited)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_row_that_is_not_finite_gives_none_and_leaves_the_others(bad: float, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=10, top_p=0.9, min_p=0.01, presence_penalty=0.1)
    logits = make_logits(rows=4, seed=7)
    rows = [make_row(params, uniform) for uniform in (0.1, 0.4, 0.6, 0.9)]
    clean = sample(logits, rows)
    logits[1, 5] = bad
    logits[2] = -math.inf
    assert sample(logits, rows) == [clean[0], None, None, clean[3]]


def test_logits_of_the_caller_are_not_written_to() -> None:
    logits = make_logits()
    before = logits.clone()
    sample(logits, [make_row(SamplingParams(**PARAMETERS["everything"]), banned_ids=BANNED)])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_drawn_in_float32(dtype: torch.dtype) -> None:
    logits = make_logits().to(dtype)
    params = SamplingParams(**PARAMETERS["everything"])
    np.testing.assert_array_equal(frequencies(logits, params), frequencies(logits.float(), params))


rows = st.builds(
    make_row,
    st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
        top_k=st.integers(0, VOCAB + 5),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        min_p=st.sampled_from([0.0, 0.05, 0.5]),
        repetition_penalty=st.sampled_from([1.0, 1.3]),
        presence_penalty=st.sampled_from([0.0, 0.7]),
        frequency_penalty=st.sampled_from([0.0, -0.4]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-5, 5), max_size=3),
    ),
    uniform=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 3),
    banned_ids=st.lists(st.integers(0, VOCAB - 1), max_size=3),
    prompt_ids=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    generated_ids=st.lists(st.integers(0, VOCAB - 1), max_size=5),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 1000), st.randoms())
def test_rows_are_independent_of_their_company(batch: list[SamplerRow], seed: int, random: Any) -> None:
    logits = make_logits(rows=len(batch), seed=seed)
    together = sample(logits, batch)
    alone = [sample(logits[n : n + 1], [row])[0] for n, row in enumerate(batch)]
    assert together == alone
    some = random.sample(range(len(batch)), random.randint(1, len(batch)))
    assert sample(logits[some], [batch[n] for n in some]) == [together[n] for n in some]


@settings(max_examples=60, deadline=None)
@given(rows, st.integers(0, 1000))
def test_token_is_possible_and_not_banned(row: SamplerRow, seed: int) -> None:
    logits = make_logits(seed=seed)
    (token,) = sample(logits, [row])
    assert token is not None and token not in row.banned_ids
    changed = reference_logits(logits[0].tolist(), row)
    if row.params.is_greedy:
        assert changed[token] == pytest.approx(max(changed), abs=1e-5)
    elif row.params.top_k:
        kth = sorted(changed, reverse=True)[min(row.params.top_k, VOCAB) - 1]
        assert changed[token] >= kth - 1e-5


@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 64, 65, 1000])
def test_vocabulary_of_any_size_is_drawn_whole(vocab: int) -> None:
    logits = make_logits(seed=9, vocab=vocab) / 10
    uniforms = np.random.default_rng(1).random((4000, NUM_UNIFORMS)).tolist()
    tokens = sample(logits.expand(4000, -1), [make_row(SamplingParams(), numbers) for numbers in uniforms])
    observed = np.bincount(np.array(tokens), minlength=vocab)
    expected = torch.softmax(logits[0].double(), dim=-1).numpy() * 4000
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic <= vocab - 1 + 4 * math.sqrt(2 * vocab)
    assert len(observed) == vocab


def test_rounding_of_the_logits_hardly_ever_changes_a_draw() -> None:
    """What lets a seed give the same tokens in any company: logits differ by rounding with the batch they ran in."""
    num_draws, vocab = 600, 16_000
    logits = 4 / 3 * make_logits(seed=10, vocab=vocab)
    noise = (
        2e-5 * make_logits(seed=11, vocab=vocab) / 3
    )  # forty times what float32 gives, to need fewer draws
    uniforms = np.random.default_rng(2).random((num_draws, NUM_UNIFORMS)).tolist()
    batch = [make_row(SamplingParams(), numbers) for numbers in uniforms]
    tokens = sample(logits.expand(num_draws, -1), batch)
    again = sample((logits + noise).expand(num_draws, -1), batch)
    assert sum(a != b for a, b in zip(tokens, again, strict=True)) <= 1


def test_logprobs_are_those_of_log_softmax_with_ranks() -> None:
    logits = make_logits(rows=3, seed=8)
    expected = torch.log_softmax(logits, dim=-1)
    chosen = [int(logits[0].argmax()), int(logits[1].argmin()), 17]
    for row, found in enumerate(logprobs_of(logits, range(3), chosen, 5)):
        token_id, value, rank = found.chosen
        assert token_id == chosen[row]
        assert value == pytest.approx(expected[row, token_id].item(), abs=1e-6)
        assert rank == 1 + int((expected[row] > expected[row, token_id]).sum())
        top = expected[row].topk(5)
        assert [token for token, _, _ in found.top] == top.indices.tolist()
        assert [value for _, value, _ in found.top] == pytest.approx(top.values.tolist(), abs=1e-6)
        assert [rank for _, _, rank in found.top] == [1, 2, 3, 4, 5]
    assert [found.chosen[2] for found in logprobs_of(logits, range(3), chosen, 0)][:2] == [1, VOCAB]


def test_logprobs_without_alternatives_and_with_more_than_there_are() -> None:
    logits = make_logits()
    assert logprobs_of(logits, [0], [3], 0)[0].top == ()
    assert len(logprobs_of(logits, [0], [3], VOCAB + 5)[0].top) == VOCAB


@pytest.mark.parametrize(
    "name", [name for name in PARAMETERS if not SamplingParams(**PARAMETERS[name]).changes_logits]
)
def test_choosing_waits_for_a_device_only_to_change_logits(name: str) -> None:
    rows = [make_row(SamplingParams(**PARAMETERS[name])), make_row(SamplingParams(temperature=0.0))]
    chosen = choose(make_logits(2).to("meta"), rows)
    assert chosen.shape == (2,) and chosen.device.type == "meta"
