"""One terminal event per request in every case, and nothing left behind, over a runner without a model."""

import time
from collections.abc import Sequence
from typing import Any

import pytest
from fake_runner import EOS, EngineHarness, expected_tokens, next_token
from schedules import LetterDecoder, assert_idle, make_adapter, make_generation

from fusionserve import metrics
from fusionserve.engine.leased_adaptation import LeasedAdaptation
from fusionserve.engine.request import Generation, Request
from fusionserve.errors import AbortedError, ArtifactError, DeadlineError, InternalError
from fusionserve.generation import (
    FinishReason,
    GenerationChunk,
    GenerationFinished,
    GenerationStarted,
    OutputOptions,
    StoppingCriteria,
)
from fusionserve.kernels.token_draw import NUM_UNIFORMS

pytestmark = pytest.mark.no_kernels


def script(*token_ids: int | None) -> Any:
    """Chooses these tokens in turn; None stands for logits that are not finite."""
    return lambda request: token_ids[request.num_generated]


def run_one(harness: EngineHarness, **spec_fields: Any) -> Any:
    """The finished event of a single generation; asserts that nothing is left after it."""
    generation = make_generation(**spec_fields)
    harness.add(generation)
    harness.run()
    assert_idle(harness.engine.scheduler)
    return harness.last(generation)


def test_events_are_started_then_chunks_then_finished() -> None:
    harness = EngineHarness()
    generation = make_generation(prompt=range(10), max_new_tokens=3)
    harness.add(generation)
    harness.run()
    started, *chunks, finished = harness.events[generation]
    assert isinstance(started, GenerationStarted)
    assert (started.request_id, started.usage.prompt_tokens) == (generation.request_id, 10)
    assert [type(chunk) for chunk in chunks] == [GenerationChunk] * 3
    assert isinstance(finished, GenerationFinished)
    (candidate,) = finished.candidates
    assert candidate.token_ids == expected_tokens(generation)[0]
    assert sum((chunk.token_ids for chunk in chunks), ()) == candidate.token_ids
    assert "".join(chunk.text for chunk in chunks) == candidate.text
    assert candidate.text == LetterDecoder().decode(candidate.token_ids)
    assert candidate.finish_reason is FinishReason.LENGTH
    assert (finished.usage.prompt_tokens, finished.usage.generated_tokens) == (10, 3)


def test_candidates_are_told_in_order_of_index_whoever_ends_first() -> None:
    harness = EngineHarness(lambda request: EOS if request.index == 0 and request.num_generated else 5)
    generation = make_generation(num_candidates=3, max_new_tokens=4)
    harness.add(generation)
    harness.run()
    finished = harness.last(generation)
    assert [candidate.index for candidate in finished.candidates] == [0, 1, 2]
    assert [candidate.finish_reason for candidate in finished.candidates] == [
        FinishReason.STOP,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
    ]
    assert finished.usage.generated_tokens == 2 + 4 + 4


@pytest.mark.parametrize(
    ("stopping", "script_ids", "text", "reason", "stop"),
    [
        ({}, (5, EOS), "f", FinishReason.STOP, (None, EOS)),
        ({"include_stop": True}, (5, EOS), "fa", FinishReason.STOP, (None, EOS)),
        ({"ignore_eos": True}, (5, EOS, 7), "fah", FinishReason.LENGTH, (None, None)),
        ({"stop_token_ids": (7,)}, (5, 7), "f", FinishReason.STOP, (None, 7)),
        ({"stop_token_ids": (7,), "ignore_eos": True}, (EOS, 7), "a", FinishReason.STOP, (None, 7)),
        ({"stop": ("gh",)}, (5, 6, 7), "f", FinishReason.STOP_STRING, ("gh", None)),
        ({"stop": ("gh",), "include_stop": True}, (5, 6, 7), "fgh", FinishReason.STOP_STRING, ("gh", None)),
        ({"stop": ("ghi",)}, (5, 6, 7), "fgh", FinishReason.LENGTH, (None, None)),
        ({"stop": ("gx",)}, (5, 6, EOS), "fg", FinishReason.STOP, (None, EOS)),
        ({"stop": ("fa",), "include_stop": True}, (5, EOS), "fa", FinishReason.STOP, (None, EOS)),
        ({"stop": ("a",), "include_stop": True}, (5, EOS), "fa", FinishReason.STOP, (None, EOS)),
        ({"stop": ("fg",), "min_new_tokens": 2}, (5, 6), "", FinishReason.STOP_STRING, ("fg", None)),
        ({"stop": ("f",), "min_new_tokens": 2}, (5, 6, 5), "fg", FinishReason.STOP_STRING, ("f", None)),
    ],
)
def test_candidate_ends_by_its_criteria(
    stopping: dict[str, Any],
    script_ids: Sequence[int],
    text: str,
    reason: FinishReason,
    stop: tuple[str | None, int | None],
) -> None:
    harness = EngineHarness(script(*script_ids))
    finished = run_one(harness, max_new_tokens=3, stopping=StoppingCriteria(**stopping))
    (candidate,) = finished.candidates
    assert (candidate.text, candidate.finish_reason) == (text, reason)
    assert (candidate.stop_string, candidate.stop_token_id) == stop
    assert candidate.token_ids == tuple(script_ids)


def test_logprobs_come_with_their_tokens() -> None:
    harness = EngineHarness()
    generation = make_generation(
        prompt=range(5), max_new_tokens=3, output=OutputOptions(logprobs=0, prompt_logprobs=0)
    )
    harness.add(generation)
    harness.run()
    (candidate,) = harness.last(generation).candidates
    assert tuple(entry.chosen.token_id for entry in candidate.logprobs) == candidate.token_ids
    chunks = [event for event in harness.events[generation] if isinstance(event, GenerationChunk)]
    for chunk in chunks:
        assert tuple(entry.chosen.token_id for entry in chunk.logprobs) == chunk.token_ids
    assert [entry.chosen.token_id for entry in harness.last(generation).prompt_logprobs] == [1, 2, 3, 4]


def test_usage_tells_the_cached_tokens() -> None:
    harness = EngineHarness()
    assert run_one(harness, prompt=range(10)).usage.cached_tokens == 0
    finished = run_one(harness, prompt=range(10))
    assert finished.usage.cached_tokens == 8
    assert run_one(harness, prompt=range(10), cache_salt="mine").usage.cached_tokens == 0


def test_abort_frees_everything_at_once_and_says_nothing() -> None:
    harness = EngineHarness()
    adapter = make_adapter()
    generation = make_generation(num_candidates=2, adapters=(adapter,), max_new_tokens=100)
    harness.add(generation)
    for _ in range(4):
        harness.step()
    num_events = len(harness.events[generation])
    harness.engine.abort(generation)
    assert_idle(harness.engine.scheduler)
    assert harness.released == [adapter]
    assert not harness.engine.has_work
    assert len(harness.events[generation]) == num_events
    harness.engine.abort(generation)
    assert harness.released == [adapter], "a second abort changes nothing"


def test_abort_after_the_end_changes_nothing() -> None:
    harness = EngineHarness()
    generation = make_generation(adapters=(make_adapter(),))
    harness.add(generation)
    harness.run()
    harness.engine.abort(generation)
    assert len(harness.released) == 1
    assert not harness.engine.has_work


def test_gauges_show_an_idle_engine_after_the_last_abort() -> None:
    harness = EngineHarness()
    generation = make_generation(max_new_tokens=100)
    harness.add(generation)
    harness.step()
    assert metrics.REQUESTS_RUNNING._value.get() == 1
    assert metrics.KV_BLOCKS_USED._value.get() > 0
    harness.engine.abort(generation)
    assert metrics.REQUESTS_RUNNING._value.get() == 0
    assert metrics.KV_BLOCKS_USED._value.get() == 0


def test_forgotten_adapter_leaves_the_pool_and_its_gauge() -> None:
    harness = EngineHarness()
    adapter = make_adapter(8)
    run_one(harness, adapters=(adapter,))
    assert metrics.ADAPTER_POOL_RANKS_USED._value.get() == 8
    harness.engine.forget(adapter.uid)
    assert metrics.ADAPTER_POOL_RANKS_USED._value.get() == 0
    assert harness.engine.scheduler.ledger.resident_uids == frozenset()


def test_abort_adapter_ends_its_users_and_no_others() -> None:
    harness = EngineHarness()
    doomed, other = make_adapter(), make_adapter()
    generations = [
        make_generation(adapters=adapters, max_new_tokens=5)
        for adapters in ((doomed,), (other,), (doomed, other), ())
    ]
    harness.add(*generations)
    harness.step()
    error = AbortedError("unloaded")
    harness.engine.abort_users(doomed, error)
    harness.run()
    assert harness.last(generations[0]) is error and harness.last(generations[2]) is error
    for generation in (generations[1], generations[3]):
        assert harness.tokens(generation) == expected_tokens(generation)
    assert len(harness.released) == 4
    assert_idle(harness.engine.scheduler)


def test_abort_all_ends_running_and_waiting_alike() -> None:
    harness = EngineHarness(max_batch_requests=1)
    generations = [make_generation(max_new_tokens=9) for _ in range(3)]
    harness.add(*generations)
    harness.step()
    error = AbortedError("shutting down")
    harness.engine.abort_all(error)
    harness.run()
    assert [harness.last(generation) for generation in generations] == [error] * 3
    assert_idle(harness.engine.scheduler)


def at(monkeypatch: pytest.MonkeyPatch, now_s: float) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: now_s)


def test_deadline_ends_a_request_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = EngineHarness(max_batch_requests=1)
    at(monkeypatch, 100.0)
    running = make_generation(arrival_s=100.0, deadline_s=101.0, max_new_tokens=100)
    waiting = make_generation(arrival_s=100.0, deadline_s=101.0)
    harness.add(running, waiting)
    harness.step()
    assert harness.engine.has_work
    at(monkeypatch, 101.0)
    harness.run()
    assert isinstance(harness.last(running), DeadlineError)
    assert isinstance(harness.last(waiting), DeadlineError)
    assert_idle(harness.engine.scheduler)


def test_timings_are_of_the_first_chunk_the_first_token_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = EngineHarness(max_batch_tokens=16)
    generation = make_generation(arrival_s=100.0, prompt=range(20), max_new_tokens=2)
    harness.add(generation)
    for now_s in (101.0, 103.0, 106.0):
        at(monkeypatch, now_s)
        harness.step()
    timings = harness.last(generation).timings
    assert (timings.queue_s, timings.time_to_first_token_s, timings.total_s) == (1.0, 3.0, 6.0)


def test_time_limit_ends_a_request_with_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = EngineHarness(script(*[8] * 50), max_batch_requests=1)
    stopping = StoppingCriteria(time_limit_s=2.0, stop=("iiix",))
    at(monkeypatch, 100.0)
    running, waiting = (
        make_generation(arrival_s=100.0, max_new_tokens=100, stopping=stopping) for _ in range(2)
    )
    harness.add(running, waiting)
    for _ in range(5):
        harness.step()
    at(monkeypatch, 102.0)
    harness.run()
    (candidate,) = harness.last(running).candidates
    assert candidate.finish_reason is FinishReason.TIME_LIMIT
    assert candidate.text == "iiiii", "held-back text is flushed"
    assert isinstance(harness.events[waiting][0], GenerationStarted)
    (empty,) = harness.last(waiting).candidates
    assert (empty.text, empty.token_ids, empty.finish_reason) == ("", (), FinishReason.TIME_LIMIT)
    assert harness.last(waiting).timings.total_s == 2.0
    assert_idle(harness.engine.scheduler)


def test_output_that_is_not_finite_ends_that_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    broken = make_adapter()

    def choose(request: Request) -> int | None:
        is_broken = broken in request.generation.adapters and request.num_generated == 1
        return None if is_broken else next_token(request)

    harness = EngineHarness(choose)
    bad = make_generation(adapters=(broken,), num_candidates=2)
    good = make_generation()
    harness.add(bad, good)
    harness.run()
    error = harness.last(bad)
    assert isinstance(error, ArtifactError)
    assert error.reason == "OUTPUT_NOT_FINITE"
    assert caplog.records == [], "the other candidate's result is no error"
    assert harness.tokens(good) == expected_tokens(good)
    assert harness.released == [broken]
    assert_idle(harness.engine.scheduler)


def test_nothing_of_a_request_that_is_not_finite_is_found_again() -> None:
    def choose(request: Request) -> int | None:
        return None if request.index == 1 and request.num_generated == 8 else next_token(request)

    harness = EngineHarness(choose)
    bad = make_generation(num_candidates=2, max_new_tokens=20)
    (good_ids, _) = expected_tokens(bad)
    harness.add(bad)
    harness.run()
    assert isinstance(harness.last(bad), ArtifactError)
    prompt = bad.prompt_token_ids
    assert run_one(harness, prompt=prompt, max_new_tokens=1).usage.cached_tokens == 0
    again = run_one(harness, prompt=[*prompt, *good_ids])
    assert again.usage.cached_tokens == 8, "the prompt's full blocks, computed anew, and none of a candidate"


def test_leases_that_cannot_be_given_back_end_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = EngineHarness()
    bad, good = make_generation(max_new_tokens=2), make_generation()

    def release(adaptation: LeasedAdaptation) -> None:
        if adaptation is bad_adaptation:
            raise KeyError("a registry's own bug")

    bad_adaptation = bad.adaptation
    monkeypatch.setattr(harness.engine, "_release_leases", release)
    harness.add(bad, good)
    harness.run()
    assert isinstance(harness.last(bad), GenerationFinished), "its client waits for no word that never comes"
    assert harness.tokens(good) == expected_tokens(good)
    assert_idle(harness.engine.scheduler)


class BrokenDecoder(LetterDecoder):
    """Fails on the token 13."""

    def decode(self, token_ids: Sequence[int]) -> str:
        if 13 in token_ids:
            raise TypeError("a tokenizer's own bug")
        return super().decode(token_ids)


def test_text_that_cannot_be_decoded_ends_that_request_alone() -> None:
    harness = EngineHarness(lambda request: 13 if request.num_generated == 1 else 5)
    bad = make_generation(decoder=BrokenDecoder(), adapters=(make_adapter(),), num_candidates=2)
    good = make_generation()
    harness.add(bad, good)
    harness.run()
    assert isinstance(harness.last(bad), InternalError)
    assert isinstance(harness.last(good), GenerationFinished)
    assert len(harness.released) == 1
    assert_idle(harness.engine.scheduler)


def test_preempted_request_tells_every_token_and_prompt_logprob_once() -> None:
    harness = EngineHarness(num_blocks=8, max_logit_tokens=3)
    output = OutputOptions(logprobs=0, prompt_logprobs=0)
    generations = [
        make_generation(prompt=range(n, n + 9), max_new_tokens=14, output=output) for n in range(4)
    ]
    harness.add(*generations)
    harness.run()
    assert harness.engine.scheduler.num_preemptions > 0
    for generation in generations:
        finished = harness.last(generation)
        told = [event for event in harness.events[generation] if isinstance(event, GenerationChunk)]
        assert [sum((chunk.token_ids for chunk in told), ())] == expected_tokens(generation)
        prompt = [entry.chosen.token_id for entry in finished.prompt_logprobs]
        assert prompt == list(generation.prompt_token_ids[1:])


def test_engine_without_requests_has_no_work() -> None:
    harness = EngineHarness()
    assert not harness.engine.has_work
    assert harness.engine.step() == []
    assert not harness.engine.is_stalled


def test_engine_is_stalled_where_a_step_computes_nothing_although_requests_wait() -> None:
    harness = EngineHarness(num_blocks=4)
    generation = make_generation(prompt=[1] * 8)
    elsewhere = harness.engine.scheduler.blocks.allocate(4)
    assert elsewhere is not None
    harness.add(generation)
    harness.engine.step()
    assert harness.engine.is_stalled
    harness.engine.scheduler.blocks.free(elsewhere)
    harness.step()
    assert not harness.engine.is_stalled
    harness.run()
    assert harness.tokens(generation) == expected_tokens(generation)


def test_seeds_of_a_request_depend_on_seed_candidate_and_position_alone() -> None:
    def draws(generation: Generation) -> list[tuple[float, ...]]:
        return [request.uniforms(request.num_generated) for request in generation.requests]

    one = draws(make_generation(seed=1, num_candidates=3))
    assert one == draws(make_generation(seed=1, num_candidates=3, prompt=range(4)))
    assert len({*one, *draws(make_generation(seed=2, num_candidates=3))}) == 6
    request = make_generation(seed=1).requests[0]
    assert not set(request.uniforms(1)) & set(request.uniforms(0))


def test_uniforms_are_uniform() -> None:
    draws = sorted(u for seed in range(300) for u in make_generation(seed=seed).requests[0].uniforms(0))
    assert len(draws) == len(set(draws)) == 300 * NUM_UNIFORMS
    assert draws[0] >= 0.0 and draws[-1] < 1.0
    gap = max(abs(draw - (index + 0.5) / len(draws)) for index, draw in enumerate(draws))
    assert gap < 1.63 / len(draws) ** 0.5  # Kolmogorov-Smirnov at 1 %
