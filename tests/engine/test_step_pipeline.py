"""Steps that are launched before the last one is read: the tokens, ends and failures of steps one after the other."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from delayed_copies import DelayedCopies
from fake_runner import EOS, EngineHarness, expected_tokens, next_token
from hypothesis import given, settings
from hypothesis import strategies as st
from late_runner import LateRunner, launches_before_reads
from schedules import BLOCK_SIZE, assert_idle, make_adapter, make_generation

from fusionserve import metrics
from fusionserve.engine.request import Generation, Request
from fusionserve.errors import ArtifactError, CapacityError, DeadlineError, FusionServeError, InternalError
from fusionserve.generation import (
    Candidate,
    FinishReason,
    GenerationChunk,
    GenerationFinished,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
)

QUIET = logging.CRITICAL + 1
MOMENTS = pytest.mark.parametrize("moment", ["launch", "read"])


class LateHarness(EngineHarness):
    """An engine over a runner that computes late."""

    runner: LateRunner

    def __init__(self, *args: Any, **fields: Any) -> None:
        super().__init__(*args, make_runner=LateRunner, **fields)

    def start(self, *generations: Generation) -> None:
        """Takes steps until all decode, and the next one is launched."""
        self.add(*generations)
        while not self.runner.num_ahead:
            self.step()


def ends_at(num_tokens: int, last: int | None = EOS) -> Any:
    """Chooses `last` after so many tokens."""
    return lambda request: last if request.num_generated == num_tokens else next_token(request)


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


@MOMENTS
@pytest.mark.parametrize("culprit", range(4))
def test_only_the_culprit_ends(moment: str, culprit: int, caplog: pytest.LogCaptureFixture) -> None:
    harness = LateHarness()
    generations = [make_generation(adapters=(make_adapter(),), max_new_tokens=9) for _ in range(4)]
    harness.runner.fails_at = moment
    harness.start(*generations)
    harness.runner.poison[generations[culprit]] = RuntimeError()
    with caplog.at_level(QUIET):
        harness.run()
    for index, generation in enumerate(generations):
        if index == culprit:
            assert isinstance(harness.last(generation), InternalError)
        else:
            assert harness.tokens(generation) == expected_tokens(generation)
    assert_idle(harness.engine.scheduler)


@MOMENTS
def test_failure_that_does_not_come_again_ends_nobody(moment: str, caplog: pytest.LogCaptureFixture) -> None:
    harness = LateHarness()
    generations = [make_generation(max_new_tokens=12) for _ in range(3)]
    harness.runner.fails_at = moment
    harness.start(*generations)
    num_ahead = harness.runner.num_ahead
    harness.runner.error = RuntimeError("once")
    with caplog.at_level(QUIET):
        harness.run()
    assert [harness.tokens(g) for g in generations] == [expected_tokens(g) for g in generations]
    assert harness.runner.num_ahead > num_ahead, "it went on ahead"


@MOMENTS
def test_first_step_launched_may_fail_like_any(moment: str, caplog: pytest.LogCaptureFixture) -> None:
    harness = LateHarness()
    generation = make_generation(max_new_tokens=5)
    harness.add(generation)
    harness.step()
    harness.runner.fails_at, harness.runner.error = moment, RuntimeError("once")
    with caplog.at_level(QUIET):
        harness.run()
    assert harness.tokens(generation) == expected_tokens(generation)


def test_failure_of_one_that_has_gone_is_nobodys(caplog: pytest.LogCaptureFixture) -> None:
    harness = LateHarness()
    gone, alone = make_generation(max_new_tokens=9), make_generation(max_new_tokens=9)
    harness.runner.fails_at = "read"
    harness.start(gone, alone)
    harness.runner.poison[gone] = RuntimeError()
    harness.engine.abort(gone)
    with caplog.at_level(QUIET):
        harness.run()
    assert harness.tokens(alone) == expected_tokens(alone)


@MOMENTS
def test_out_of_memory_ends_the_newest(moment: str, caplog: pytest.LogCaptureFixture) -> None:
    harness = LateHarness()
    generations = [make_generation(max_new_tokens=12) for _ in range(4)]
    harness.runner.fails_at = moment
    harness.start(*generations)
    harness.runner.max_requests = 3
    with caplog.at_level(QUIET):
        harness.run()
    *kept, newest = generations
    assert [harness.tokens(g) for g in kept] == [expected_tokens(g) for g in kept]
    error = harness.last(newest)
    assert isinstance(error, CapacityError) and error.reason == "OUT_OF_MEMORY"


@MOMENTS
def test_lost_device_ends_the_engine(moment: str) -> None:
    harness = LateHarness()
    harness.runner.fails_at = moment
    harness.start(make_generation(max_new_tokens=12))
    harness.runner.error = torch.AcceleratorError("the device is gone")
    with pytest.raises(torch.AcceleratorError):
        harness.step()


# Any mix of requests against each of them alone, one step after the other


def choose_lively(request: Request) -> int | None:
    """Now and then the end of the text, hardly ever logits that are not finite."""
    token_id = next_token(request)
    if token_id % 12 == 0:
        return EOS
    return None if token_id == 47 else token_id


ADAPTERS = tuple(make_adapter(rank) for rank in (1, 8, 8, 16))


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    length = draw(st.integers(1, 12))
    max_new_tokens = draw(st.integers(1, 40 - length))
    stopping = StoppingCriteria(
        stop=draw(st.sampled_from([(), (), ("c",), ("ab", "q")])),
        stop_token_ids=draw(st.sampled_from([(), (), (5, 6)])),
        include_stop=draw(st.booleans()),
        ignore_eos=draw(st.booleans()),
        min_new_tokens=draw(st.sampled_from([0, 0, 0, min(3, max_new_tokens)])),
        time_limit_s=draw(st.sampled_from([None, None, None, 9.0])),
    )
    return {
        "prompt": [draw(st.integers(1, 2))] * length,
        "adapters": tuple(draw(st.lists(st.sampled_from(ADAPTERS), max_size=2, unique=True))),
        "max_new_tokens": max_new_tokens,
        "num_candidates": draw(st.sampled_from([1, 1, 2, 3])),
        "priority": draw(st.integers(0, 1)),
        "seed": draw(st.integers(0, 3)),
        "stopping": stopping,
        "sampling": SamplingParams(presence_penalty=draw(st.sampled_from([0.0] * 5 + [0.5]))),
        "output": OutputOptions(logprobs=draw(st.sampled_from([None] * 5 + [0]))),
        "deadline_s": draw(st.sampled_from([None, None, None, 20.0])),
    }


def run_alone(spec: dict[str, Any]) -> Any:
    """The last event of a request by itself, one step after the other and without an end in time."""
    harness = EngineHarness(choose_lively)
    stopping = replace(spec["stopping"], time_limit_s=None)
    generation = make_generation(**spec | {"stopping": stopping, "deadline_s": None})
    harness.add(generation)
    harness.run()
    return harness.last(generation)


def check_end(events: Sequence[Any], alone: Any, candidates: dict[int, Candidate]) -> None:
    """Same tokens, text and reason; who was ended in time or by its client has a beginning of them."""
    last = events[-1] if events else None
    if isinstance(last, ArtifactError):
        assert isinstance(alone, ArtifactError)
    if not isinstance(alone, GenerationFinished):
        return
    for event in events:
        if isinstance(event, GenerationChunk):
            whole = candidates[event.candidate_index].token_ids
            assert set(event.token_ids) <= set(whole)
    if not isinstance(last, GenerationFinished):
        return
    for ours, theirs in zip(last.candidates, alone.candidates, strict=True):
        if ours.finish_reason is FinishReason.TIME_LIMIT:
            assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
        else:
            assert (ours.token_ids, ours.text) == (theirs.token_ids, theirs.text)
            assert (ours.finish_reason, ours.stop_string) == (theirs.finish_reason, theirs.stop_string)


@settings(max_examples=120, deadline=None)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 8), specs(), st.one_of(st.none(), st.integers(1, 12))),
        min_size=1,
        max_size=8,
    ),
    num_blocks=st.integers(40 // BLOCK_SIZE, 24),
    pool_ranks=st.integers(24, 40),
    max_batch_tokens=st.integers(4, 24),
    max_batch_requests=st.integers(1, 6),
    enable_prefix_cache=st.booleans(),
    copies=st.one_of(st.none(), st.builds(DelayedCopies, st.integers(0, 4))),
)
def test_any_mix_gets_the_tokens_that_each_gets_alone(
    arrivals: list[tuple[int, dict[str, Any], int | None]], **limits: Any
) -> None:
    now_s = [0.0]
    harness = LateHarness(choose_lively, **limits)
    added: list[tuple[Generation, dict[str, Any]]] = []
    aborts: dict[int, list[Generation]] = {}

    def step() -> None:
        for generation in aborts.pop(int(now_s[0]), ()):
            harness.engine.abort(generation)
        harness.step()
        now_s[0] += 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now_s[0])
        for wait, spec, abort_after in arrivals:
            for _ in range(wait):
                step()
            deadline_s = spec["deadline_s"] and now_s[0] + spec["deadline_s"]
            generation = make_generation(
                **spec | {"deadline_s": deadline_s, "arrival_s": now_s[0] + 1e-6 * len(added)}
            )
            harness.add(generation)
            added.append((generation, spec))
            if abort_after is not None:
                aborts.setdefault(int(now_s[0]) + abort_after, []).append(generation)
        while harness.engine.has_work:
            step()
            assert now_s[0] < 20_000
    for generation, spec in added:
        alone = run_alone(spec)
        candidates = {c.index: c for c in getattr(alone, "candidates", ())}
        check_end(harness.events[generation], alone, candidates)
        terminal = [
            e for e in harness.events[generation] if isinstance(e, GenerationFinished | FusionServeError)
        ]
        assert len(terminal) <= 1
    assert_idle(harness.engine.scheduler)
