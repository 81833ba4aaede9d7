"""What each step computes: budgets, priorities, prefix hits, preemption, and that all ends well."""

from typing import Any

import pytest
from delayed_copies import DelayedCopies
from fake_runner import EngineHarness, expected_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import (
    BLOCK_SIZE,
    add_running,
    as_made,
    assert_idle,
    complete,
    make_adapter,
    make_generation,
    make_request,
    make_scheduler,
    sizes,
)

from fusionserve import metrics
from fusionserve.engine.request import RequestStatus
from fusionserve.generation import OutputOptions

pytestmark = pytest.mark.no_kernels


def test_prompt_is_chunked_by_the_token_budget() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    request = make_request(prompt=range(40))
    scheduler.add(request)
    seen = []
    for _ in range(4):
        batch = scheduler.schedule()
        (chunk,) = batch.chunks
        seen.append((chunk.start, chunk.end, chunk.is_last))
        assert batch.num_tokens <= 16
        complete(scheduler, batch)
        scheduler.check_integrity()
    assert seen == [(0, 16, False), (16, 32, False), (32, 40, True), (40, 41, True)]


def test_budget_is_shared_by_the_requests_that_fit() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    requests = [make_request(prompt=[n] * 7) for n in range(3)]
    for request in requests:
        scheduler.add(request)
    assert sizes(scheduler.schedule()) == dict(zip(requests, (7, 7, 2), strict=True))


def test_decoding_requests_come_before_chunks_of_prompts() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    prompt = make_request(prompt=range(100, 150), arrival_s=0)
    scheduler.add(prompt)
    complete(scheduler, scheduler.schedule())
    decoding = make_request(prompt=[1], arrival_s=1)
    scheduler.running.append(decoding)  # admitted while the prompt leaves nothing of the budget
    decoding.status = RequestStatus.RUNNING
    assert sizes(scheduler.schedule()) == {decoding: 1, prompt: 15}


def test_every_decoding_request_gets_its_token_in_every_step() -> None:
    scheduler = make_scheduler(max_batch_tokens=8, max_batch_requests=8)
    decoding = [add_running(scheduler, prompt=[n] * 3) for n in range(5)]
    scheduler.add(make_request(prompt=range(100, 150)))
    for _ in range(5):
        batch = scheduler.schedule()
        assert batch.num_tokens == 8
        assert all(sizes(batch)[request] == 1 for request in decoding)
        complete(scheduler, batch)


def test_max_batch_requests_bounds_the_running_ones() -> None:
    scheduler = make_scheduler(max_batch_requests=2)
    requests = [make_request(prompt=[n]) for n in range(3)]
    for request in requests:
        scheduler.add(request)
    assert list(sizes(scheduler.schedule())) == requests[:2]
    scheduler.remove(requests[0])
    assert requests[2] in sizes(scheduler.schedule())


def test_queue_is_by_priority_then_arrival() -> None:
    scheduler = make_scheduler(max_batch_requests=1)
    late, early, urgent = (
        make_request(prompt=[n], arrival_s=arrival_s, priority=priority)
        for n, (arrival_s, priority) in enumerate([(3.0, 0), (2.0, 0), (4.0, 1)])
    )
    served = []
    for request in (late, early, urgent):
        scheduler.add(request)
    for _ in range(3):
        (request,) = sizes(scheduler.schedule())
        served.append(request)
        scheduler.remove(request)
    assert served == [urgent, early, late]


def test_prefix_hit_skips_full_blocks_only() -> None:
    scheduler = make_scheduler()
    add_running(scheduler, prompt=range(10))
    same = make_request(prompt=[*range(10), 77, 78])
    scheduler.add(same)
    chunk = next(chunk for chunk in scheduler.schedule().chunks if chunk.request is same)
    assert (chunk.start, chunk.end) == (8, 12)
    scheduler.check_integrity()


@pytest.mark.parametrize("length", [BLOCK_SIZE, 2 * BLOCK_SIZE])
def test_prefix_hit_leaves_a_token_to_compute(length: int) -> None:
    scheduler = make_scheduler()
    first = add_running(scheduler, prompt=range(length))
    scheduler.remove(first)
    again = make_request(prompt=range(length))
    scheduler.add(again)
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.start, chunk.end) == (length - BLOCK_SIZE, length)


def test_prefix_is_not_shared_between_adaptations_or_salts() -> None:
    scheduler = make_scheduler()
    adapter = make_adapter()
    add_running(scheduler, prompt=range(12))
    strangers = [
        make_request(prompt=range(12), adapters=(adapter,)),
        make_request(prompt=range(12), cache_salt="mine"),
    ]
    for request in strangers:
        scheduler.add(request)
        starts = {chunk.request: chunk.start for chunk in scheduler.schedule().chunks}
        assert starts[request] == 0
        scheduler.remove(request)


def test_prefix_cache_can_be_off() -> None:
    scheduler = make_scheduler(enable_prefix_cache=False)
    add_running(scheduler, prompt=range(12))
    again = make_request(prompt=range(12))
    scheduler.add(again)
    assert {chunk.start for chunk in scheduler.schedule().chunks if chunk.request is again} == {0}


def test_prompt_logprobs_compute_the_whole_prompt_in_bounded_chunks() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, max_logit_tokens=5)
    add_running(scheduler, prompt=range(12))
    request = make_request(prompt=range(12), output=OutputOptions(prompt_logprobs=1))
    scheduler.add(request)
    seen = []
    while request.num_generated == 0:
        batch = scheduler.schedule()
        seen += [(chunk.start, chunk.end) for chunk in batch.chunks if chunk.request is request]
        complete(scheduler, batch)
    assert seen == [(0, 5), (5, 10), (10, 12)]


def test_prompt_that_finds_nothing_again_begins_once_there_are_blocks_for_all_of_it() -> None:
    scheduler = make_scheduler(num_blocks=6, max_logit_tokens=4)
    stream = add_running(scheduler, prompt=range(12), max_new_tokens=40)
    asking = make_request(prompt=range(16), output=OutputOptions(prompt_logprobs=1))
    scheduler.add(asking)
    for _ in range(4):
        batch = scheduler.schedule()
        assert asking not in sizes(batch), "it would be computed in vain"
        complete(scheduler, batch)
    assert scheduler.num_preemptions == 0
    scheduler.remove(stream)
    assert asking in sizes(scheduler.schedule())


def test_preemption_takes_the_lowest_priority_then_the_latest() -> None:
    scheduler = make_scheduler(num_blocks=4)
    prompts = [[n] * BLOCK_SIZE for n in range(4)]
    first, last, low, middle = (
        make_request(prompt=prompt, arrival_s=arrival_s, priority=priority)
        for prompt, (arrival_s, priority) in zip(
            prompts, [(1.0, 1), (9.0, 1), (0.0, 0), (2.0, 1)], strict=True
        )
    )
    for request in (first, last, low, middle):
        scheduler.add(request)
    before = metrics.PREEMPTIONS.labels("blocks")._value.get()
    complete(scheduler, scheduler.schedule())
    assert len(scheduler.running) == 4
    planned = sizes(scheduler.schedule())  # all four need a second block
    assert set(planned) == {first, middle}
    assert set(scheduler.waiting) == {low, last}
    assert scheduler.num_preemptions == 2
    assert metrics.PREEMPTIONS.labels("blocks")._value.get() == before + 2
    assert low.num_computed_tokens == 0 and low.blocks == []
    scheduler.check_integrity()


def test_step_that_preempts_admits_nobody() -> None:
    scheduler = make_scheduler(num_blocks=3)
    old = make_request(prompt=[1] * BLOCK_SIZE, arrival_s=1)
    new = make_request(prompt=[2] * 2 * BLOCK_SIZE, arrival_s=2)
    scheduler.add(old)
    scheduler.add(new)
    complete(scheduler, scheduler.schedule())
    urgent = make_request(prompt=[3], priority=1)
    scheduler.add(urgent)
    step = scheduler.schedule()
    assert set(sizes(step)) == {old}
    assert set(scheduler.waiting) == {new, urgent} and scheduler.blocks.num_free == 1
    complete(scheduler, step)
    assert set(sizes(scheduler.schedule())) == {old, urgent}


def test_preempted_request_finishes_with_the_same_tokens() -> None:
    harness = EngineHarness(num_blocks=8)
    generations = [make_generation(prompt=[n] * 9, max_new_tokens=14) for n in range(4)]
    harness.add(*generations)
    harness.run()
    assert harness.engine.scheduler.num_preemptions > 0
    for generation in generations:
        assert harness.tokens(generation) == expected_tokens(generation)
    assert_idle(harness.engine.scheduler)


def test_siblings_wait_for_the_first_candidate_and_share_its_prompt() -> None:
    scheduler = make_scheduler(max_batch_tokens=16)
    first, *others = make_generation(prompt=range(20), num_candidates=3).requests
    for request in (first, *others):
        scheduler.add(request)
    for num_tokens in (16, 4):
        step = scheduler.schedule()
        assert sizes(step) == {first: num_tokens}
        complete(scheduler, step)
    step = scheduler.schedule()
    assert {chunk.request: (chunk.start, chunk.end) for chunk in step.chunks} == {
        first: (20, 21),
        others[0]: (16, 20),
        others[1]: (16, 20),
    }
    assert others[0].blocks[:4] == others[1].blocks[:4] == first.blocks[:4]
    scheduler.check_integrity()


def test_siblings_do_not_wait_for_a_first_candidate_that_has_ended() -> None:
    scheduler = make_scheduler()
    first, second = make_generation(prompt=range(20), num_candidates=2).requests
    scheduler.add(first)
    scheduler.add(second)
    scheduler.remove(first)
    assert list(sizes(scheduler.schedule())) == [second]


def test_remove_gives_everything_back_in_any_state() -> None:
    scheduler = make_scheduler(max_batch_requests=1)
    adapter = make_adapter()
    running, waiting = (make_request(prompt=[n] * 9, adapters=(adapter,)) for n in (1, 2))
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.schedule()
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert running.is_finished and waiting.is_finished
    assert_idle(scheduler)


ADAPTERS = tuple(make_adapter(rank) for rank in (1, 8, 8, 16, 24))


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """One request that fits the smallest pools of the property test, though hardly."""
    length = draw(st.integers(1, 24))
    adapters = draw(st.lists(st.sampled_from(ADAPTERS), max_size=2, unique=True))
    if sum(adapter.num_rows for adapter in adapters) > 24:
        adapters = adapters[:1]
    return {
        "prompt": [draw(st.integers(1, 2))] * length,  # hardly any prompts, so that prefixes meet
        "adapters": tuple(adapters),
        "scales": draw(st.sampled_from([(1.0, 1.0), (0.5, 1.0)]))[: len(adapters)],
        "max_new_tokens": draw(st.integers(1, 40 - length)),
        "num_candidates": draw(st.integers(1, 3)),
        "priority": draw(st.integers(0, 2)),
        "cache_salt": draw(st.sampled_from(["", "", "salt"])),
        "output": OutputOptions(prompt_logprobs=draw(st.sampled_from([None, None, 0]))),
    }


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 6), specs()), min_size=1, max_size=10),
    num_blocks=st.integers(40 // BLOCK_SIZE, 24),
    pool_ranks=st.integers(24, 40),
    max_batch_tokens=st.integers(1, 24),
    max_batch_requests=st.integers(1, 6),
    max_logit_tokens=st.integers(1, 8),
    enable_prefix_cache=st.booleans(),
    copies=st.one_of(st.none(), st.builds(DelayedCopies, st.integers(0, 4))),
)
def test_all_requests_finish_with_their_own_tokens_when_everything_is_tight(
    arrivals: list[tuple[int, dict[str, Any]]], **limits: Any
) -> None:
    harness = EngineHarness(**limits)
    generations = [(wait, make_generation(**spec)) for wait, spec in arrivals]
    for wait, generation in generations:
        harness.add(generation)
        for _ in range(wait):
            harness.step()
    harness.run(max_steps=20_000)
    for _, generation in generations:
        assert harness.tokens(generation) == expected_tokens(generation)
        num_known = len(harness.last(generation).prompt_logprobs)
        wanted = generation.params.output.prompt_logprobs is not None
        assert num_known == (len(generation.prompt_token_ids) - 1 if wanted else 0)
        assert set(as_made(generation).adapters) <= set(harness.released)
        assert not generation.adapters and not generation.requests, "it holds on to nothing"
    assert len(harness.released) == sum(len(as_made(generation).adapters) for _, generation in generations)
    assert all(batch.num_tokens <= limits["max_batch_tokens"] for batch in harness.runner.batches)
    assert all(len(batch.chunks) <= limits["max_batch_requests"] for batch in harness.runner.batches)
    assert_idle(harness.engine.scheduler)


def test_prompts_beside_decoding_requests_are_bounded() -> None:
    scheduler = make_scheduler(max_batch_tokens=16, min_prompt_tokens=6)
    first = make_request(prompt=range(12))
    scheduler.add(first)
    step = scheduler.schedule()
    assert sizes(step) == {first: 12}, "alone a prompt has the whole step"
    complete(scheduler, step)
    second, third = make_request(prompt=range(20, 24)), make_request(prompt=range(30, 50))
    scheduler.add(second)
    scheduler.add(third)
    step = scheduler.schedule()
    assert sizes(step) == {first: 1, second: 4, third: 2}
    complete(scheduler, step)
    assert sizes(scheduler.schedule()) == {first: 1, second: 1, third: 6}
