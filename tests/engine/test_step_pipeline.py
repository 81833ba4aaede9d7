"""Steps that are launched before the last one is read: the tokens and ends of steps one after the other."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_runner import EOS, expected_tokens, next_token
from late_runner import LateHarness, ends_at, launches_before_reads
from schedules import BLOCK_SIZE, assert_idle, make_adapter, make_generation

from fusionserve import metrics
from fusionserve.engine.request import Request
from fusionserve.errors import ArtifactError, DeadlineError
from fusionserve.generation import (
    FinishReason,
    GenerationChunk,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
)

pytestmark = pytest.mark.no_kernels


def test_next_step_is_launched_before_the_last_one_is_read() -> None:
    harness = LateHarness()
    generations = [make_generation(max_new_tokens=8, adapters=(make_adapter(),)) for _ in range(3)]
    harness.add(*generations)
    num_steps = harness.run()
    assert [harness.tokens(g) for g in generations] == [expected_tokens(g) for g in generations]
    log = harness.runner.log
    last = max(number for _, number in log)
    num_prompt_steps = sum(what == "execute" for what, _ in log)
    assert launches_before_reads(log) == list(range(num_prompt_steps, last)), log
    assert log[-1] == ("read", last), "the last one was launched with nobody left to go on"
    assert num_steps == len(harness.runner.batches)
    assert_idle(harness.engine.scheduler)


def test_request_that_its_length_ends_is_not_computed_again() -> None:
    harness = LateHarness()
    short, long = make_generation(max_new_tokens=4), make_generation(prompt=[3] * 10, max_new_tokens=9)
    harness.start(short, long)
    harness.run()
    assert harness.runner.num_in_vain == 0
    assert harness.runner.num_tokens == 10 + 3 + 10 + 8
    assert harness.tokens(short) == expected_tokens(short)
    assert harness.tokens(long) == expected_tokens(long)


@pytest.mark.parametrize(
    ("last", "stopping", "reason"),
    [
        (EOS, StoppingCriteria(), FinishReason.STOP),
        (7, StoppingCriteria(stop_token_ids=(7,)), FinishReason.STOP),
        (EOS, StoppingCriteria(include_stop=True), FinishReason.STOP),
        (7, StoppingCriteria(stop=("h",)), FinishReason.STOP_STRING),
    ],
)
def test_step_in_vain_is_in_no_text_usage_or_cache(
    last: int, stopping: StoppingCriteria, reason: FinishReason
) -> None:
    def choose(request: Request) -> int:
        return last if request.num_generated == 2 * request.token_ids[0] else 20 + request.num_generated

    harness = LateHarness(choose)
    length = 2 * BLOCK_SIZE - 3  # the last token would fill a block
    generation = make_generation(prompt=[1] * length, max_new_tokens=20, stopping=stopping)
    other = make_generation(prompt=[2] * length, max_new_tokens=20, stopping=stopping)
    before, published = metrics.GENERATED_TOKENS._value.get(), harness.engine.scheduler.blocks._block_of
    harness.add(generation, other)
    harness.run()
    assert harness.runner.num_in_vain == 1
    (candidate,) = harness.last(generation).candidates
    assert candidate.token_ids == (20, 21, last) and candidate.finish_reason is reason
    assert harness.last(generation).usage.generated_tokens == 3
    told = [event for event in harness.events[generation] if isinstance(event, GenerationChunk)]
    assert sum((chunk.token_ids for chunk in told), ()) == candidate.token_ids
    assert metrics.GENERATED_TOKENS._value.get() == before + 3 + 5
    assert len(published) == 1 + 2, "full blocks of what was told, and no others"
    assert_idle(harness.engine.scheduler)


def test_blocks_and_rows_of_the_ended_serve_others_behind_the_step_in_vain() -> None:
    harness = LateHarness(ends_at(3), num_blocks=8, pool_ranks=8)
    first, second = make_adapter(8), make_adapter(8)
    generation = make_generation(adapters=(first,), max_new_tokens=15)
    harness.start(generation)
    while harness.engine.has_work:
        harness.step()
    assert harness.engine._pipeline._launched is not None, "a step for nobody is on the device"
    harness.engine.forget(first.uid)
    again = make_generation(prompt=[4] * 24, adapters=(second,), max_new_tokens=3)
    harness.add(again)
    harness.run()
    assert harness.tokens(again) == expected_tokens(again)
    assert harness.runner.num_in_vain == 0, "nobody waits for a step that has nobody left"


def test_abort_with_a_step_launched_frees_everything_at_once() -> None:
    harness = LateHarness()
    gone, other = (make_generation(adapters=(make_adapter(),), max_new_tokens=9) for _ in range(2))
    harness.start(gone, other)
    num_events = len(harness.events[gone])
    harness.engine.abort(gone)
    harness.engine.scheduler.check_integrity()
    assert len(harness.released) == 1
    harness.run()
    assert len(harness.events[gone]) == num_events
    assert harness.tokens(other) == expected_tokens(other)
    assert harness.runner.num_in_vain == 1
    assert_idle(harness.engine.scheduler)


def test_end_in_time_says_what_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = LateHarness()
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    late = make_generation(arrival_s=100.0, deadline_s=101.0, max_new_tokens=99)
    limited = make_generation(
        arrival_s=100.0, max_new_tokens=99, stopping=StoppingCriteria(time_limit_s=1.0, ignore_eos=True)
    )
    harness.start(late, limited)
    monkeypatch.setattr(time, "monotonic", lambda: 101.0)
    harness.run()
    assert isinstance(harness.last(late), DeadlineError)
    (candidate,) = harness.last(limited).candidates
    assert candidate.finish_reason is FinishReason.TIME_LIMIT
    whole = expected_tokens(limited)[0]
    assert candidate.token_ids and candidate.token_ids == whole[: len(candidate.token_ids)]
    assert_idle(harness.engine.scheduler)


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    broken = make_adapter()

    def choose(request: Request) -> int | None:
        is_broken = broken in request.generation.adapters and request.num_generated == 2
        return None if is_broken else next_token(request)

    harness = LateHarness(choose)
    bad, good = make_generation(adapters=(broken,), max_new_tokens=9), make_generation(max_new_tokens=9)
    harness.add(bad, good)
    harness.run()
    assert isinstance(harness.last(bad), ArtifactError)
    assert harness.tokens(good) == expected_tokens(good)
    assert harness.runner.num_in_vain == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling": SamplingParams(repetition_penalty=1.1)},
        {"sampling": SamplingParams(frequency_penalty=0.1)},
        {"sampling": SamplingParams(presence_penalty=0.1)},
        {"sampling": SamplingParams(logit_bias={3: 1.0})},
        {"stopping": StoppingCriteria(min_new_tokens=9)},
        {"output": OutputOptions(logprobs=0)},
        {"output": OutputOptions(prompt_logprobs=0)},
    ],
)
def test_what_depends_on_more_than_the_last_token_is_not_launched_ahead(fields: dict[str, Any]) -> None:
    harness = LateHarness()
    generation, plain = make_generation(max_new_tokens=9, **fields), make_generation(max_new_tokens=9)
    harness.add(generation, plain)
    harness.run()
    assert harness.runner.num_ahead == 0
    assert harness.tokens(generation) == expected_tokens(generation)


def test_whole_modules_are_not_launched_ahead() -> None:
    adapter = make_adapter()
    weights = replace(adapter.weights, replacements={"lm_head": torch.zeros(1, 1)})
    adapter = replace(adapter, content=replace(adapter.content, weights=weights))
    assert not adapter.weights.is_low_rank_only
    harness = LateHarness()
    harness.add(make_generation(adapters=(adapter,), max_new_tokens=9))
    harness.run()
    assert harness.runner.num_ahead == 0


def test_runner_that_does_not_run_ahead_gets_one_step_at_a_time() -> None:
    harness = LateHarness()
    harness.runner.runs_ahead = False
    harness.add(make_generation(max_new_tokens=9))
    harness.run()
    assert {what for what, _ in harness.runner.log} == {"execute"}


def test_newcomer_is_scheduled_once_everything_is_read() -> None:
    harness = LateHarness()
    harness.start(make_generation(max_new_tokens=30))
    newcomer = make_generation(prompt=[5] * 9, max_new_tokens=3)
    harness.add(newcomer)
    harness.step()  # reads what was launched before it came
    assert harness.engine._pipeline._launched is None
    harness.step()
    assert newcomer.requests[0] in [chunk.request for chunk in harness.runner.batches[-1].chunks]
    harness.run()
    assert harness.tokens(newcomer) == expected_tokens(newcomer)


def test_queue_behind_a_full_batch_is_looked_at_once_and_then_waits() -> None:
    harness = LateHarness(max_batch_requests=2)
    running = [make_generation(max_new_tokens=40) for _ in range(2)]
    harness.start(*running)
    harness.add(*(make_generation(prompt=[n] * 3, max_new_tokens=12) for n in range(2, 5)))
    harness.step()
    harness.step()
    num_ahead = harness.runner.num_ahead
    for _ in range(10):
        harness.step()
    assert harness.runner.num_ahead == num_ahead + 10
    assert len(harness.engine.scheduler.waiting) == 3
    harness.run()
    assert all(harness.tokens(generation) for generation in harness.events)
    assert_idle(harness.engine.scheduler)


def test_step_that_needs_blocks_of_others_is_not_launched_ahead() -> None:
    harness = LateHarness(num_blocks=8)
    generations = [make_generation(prompt=[n] * 9, max_new_tokens=14) for n in range(4)]
    harness.add(*generations)
    harness.run()
    assert harness.engine.scheduler.num_preemptions > 0 and harness.runner.num_ahead > 0
    assert [harness.tokens(g) for g in generations] == [expected_tokens(g) for g in generations]
    assert_idle(harness.engine.scheduler)
