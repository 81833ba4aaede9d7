"""Which logits a step computes, and that each chunk is given what it asks for, and no more, from its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import pytest
import torch
from schedules import make_request
from torch import Tensor

from fusionserve.engine.chunk_result import ChunkResult
from fusionserve.engine.fused_chunks import LateWeights
from fusionserve.engine.logit_rows import plan_logit_rows, sampler_row, to_results
from fusionserve.engine.request import Request
from fusionserve.engine.scheduled_batch import ScheduledChunk
from fusionserve.generation import OutputOptions, SamplingParams, StoppingCriteria

VOCAB, EOS, STOP = 12, 0, 7
PROMPT = tuple(range(1, 11))


def request_with(*generated: int, **fields: Any) -> Request:
    """A greedy request over PROMPT that has generated so much."""
    request = make_request(**{"prompt": PROMPT, "sampling": SamplingParams(temperature=0.0), **fields})
    request.token_ids.extend(generated)
    return request


def chunk_of(request: Request, start: int = 0, num_tokens: int | None = None) -> ScheduledChunk:
    """So many of its tokens, by default all of them, from `start` on."""
    rest = len(request.token_ids) - start
    return ScheduledChunk(request, start, rest if num_tokens is None else num_tokens, ())


def results_of(chunks: Sequence[ScheduledChunk], logits: Tensor) -> list[ChunkResult]:
    """What a step of `chunks` gives, with logits [tokens, vocab] of every token in it."""
    planned = plan_logit_rows(chunks, [0, *accumulate(chunk.num_tokens for chunk in chunks)])
    wanted = [place for rows in planned for place in rows.places]
    return to_results(planned, logits[wanted], frozenset({EOS}), LateWeights([]))


def random_logits(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, VOCAB, generator=torch.Generator().manual_seed(num_tokens))


@pytest.mark.parametrize(
    ("generated", "start", "num_tokens", "places"),
    [
        ((), 0, 4, [0, 1, 2, 3]),
        ((), 4, 6, [0, 1, 2, 3, 4, 5]),
        ((5, 6, 7), 4, 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ((5, 6, 7), 10, 3, [2]),
        ((5, 6, 7), 10, 2, []),
    ],
)
def test_reported_prompt_takes_the_logits_of_all_its_tokens(
    generated: Sequence[int], start: int, num_tokens: int, places: list[int]
) -> None:
    request = request_with(*generated, output=OutputOptions(prompt_logprobs=0))
    (rows,) = plan_logit_rows([chunk_of(request, start, num_tokens)], [0])
    assert list(rows.places) == places


def test_prompt_logprobs_of_chunks_join_to_those_of_the_whole_prompt() -> None:
    logits = random_logits(len(PROMPT))
    request = request_with(output=OutputOptions(prompt_logprobs=2))
    (whole,) = results_of([chunk_of(request)], logits)
    assert [entry.chosen[0] for entry in whole.prompt_logprobs] == list(PROMPT[1:])
    told = []
    for start, end in ((0, 4), (4, 8), (8, 10)):
        (part,) = results_of([chunk_of(request, start, end - start)], logits[start:end])
        told += part.prompt_logprobs
    assert tuple(told) == whole.prompt_logprobs


def test_each_request_is_given_as_many_of_the_most_likely_tokens_as_it_asks_for() -> None:
    asked = [None, 0, 3, 1]
    requests = [request_with(5, output=OutputOptions(logprobs=num_top)) for num_top in asked]
    results = results_of([chunk_of(request, len(PROMPT)) for request in requests], random_logits(len(asked)))
    assert [result.logprobs and len(result.logprobs.top) for result in results] == asked


def test_tokens_are_drawn_from_the_last_row_of_each_chunk() -> None:
    reported = chunk_of(request_with(output=OutputOptions(prompt_logprobs=0)))
    plain = chunk_of(request_with(output=OutputOptions(logprobs=0)))
    logits = random_logits(2 * len(PROMPT))
    results = results_of([reported, plain], logits)
    drawn = [int(logits[place].argmax()) for place in (len(PROMPT) - 1, -1)]
    assert [result.token_id for result in results] == drawn
    assert results[0].logprobs is None
    assert results[1].logprobs is not None and results[1].logprobs.chosen[0] == drawn[1]


def test_chunk_within_a_prompt_draws_nothing_and_is_no_failure() -> None:
    logits = torch.full((len(PROMPT) + 3, VOCAB), float("nan"))
    requests = [request_with(output=OutputOptions(logprobs=1)) for _ in range(2)]
    within, last = results_of([chunk_of(requests[0], 0, 3), chunk_of(requests[1])], logits)
    assert (within.token_id, within.is_finite, within.logprobs) == (None, True, None)
    assert (last.token_id, last.is_finite, last.logprobs) == (None, False, None)


@pytest.mark.parametrize(
    ("generated", "ignore_eos", "banned"),
    [((), False, {STOP, EOS}), ((5,), True, {STOP}), ((5, 6), False, set())],
    ids=["before the minimum", "before it, the end of text ignored", "from it on"],
)
def test_what_would_end_the_text_is_banned_before_the_minimum(
    generated: Sequence[int], ignore_eos: bool, banned: set[int]
) -> None:
    stopping = StoppingCriteria(min_new_tokens=2, stop_token_ids=(STOP,), ignore_eos=ignore_eos)
    row = sampler_row(chunk_of(request_with(*generated, stopping=stopping)), frozenset({EOS}))
    assert set(row.banned_ids) == banned
