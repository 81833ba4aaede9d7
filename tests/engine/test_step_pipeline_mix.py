"""Steps launched ahead: any mix of requests against each of them alone, one step after the other."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from delayed_copies import DelayedCopies
from fake_runner import EOS, EngineHarness, next_token
from hypothesis import given, settings
from hypothesis import strategies as st
from late_runner import LateHarness
from schedules import BLOCK_SIZE, assert_idle, make_adapter, make_generation

from fusionserve.engine.request import Generation, Request
from fusionserve.errors import ArtifactError, DeadlineError, FusionServeError
from fusionserve.generation import (
    FinishReason,
    GenerationChunk,
    GenerationFinished,
    OutputOptions,
    SamplingParams,
    StoppingCriteria,
)

pytestmark = pytest.mark.no_kernels


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


def check_end(events: Sequence[Any], alone: Any, *, is_aborted: bool, has_deadline: bool) -> None:
    """Same tokens, text and reason; who was ended in time or by its client has a beginning of them."""
    terminal = [event for event in events if isinstance(event, GenerationFinished | FusionServeError)]
    assert len(terminal) == 1 or (is_aborted and not terminal)
    assert terminal in ([], list(events[-1:])), "it is the last event"
    for last in terminal:
        if isinstance(last, DeadlineError):
            assert has_deadline
        elif isinstance(last, GenerationFinished):
            check_candidates(last, alone)
        else:
            assert isinstance(last, ArtifactError) and isinstance(alone, ArtifactError)
    if isinstance(alone, GenerationFinished):
        check_told(events, alone)


def check_told(events: Sequence[Any], alone: GenerationFinished) -> None:
    """The chunks of each candidate join to a beginning of its tokens."""
    for candidate in alone.candidates:
        own = [e for e in events if isinstance(e, GenerationChunk) and e.candidate_index == candidate.index]
        told = tuple(token_id for chunk in own for token_id in chunk.token_ids)
        assert told == candidate.token_ids[: len(told)]


def check_candidates(last: GenerationFinished, alone: Any) -> None:
    """Each is the same, or a beginning; logits that are not finite are escaped only by a time limit."""
    late = [ours for ours in last.candidates if ours.finish_reason is FinishReason.TIME_LIMIT]
    if isinstance(alone, ArtifactError):
        assert late
        return
    for ours, theirs in zip(last.candidates, alone.candidates, strict=True):
        if ours in late:
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
    added: list[tuple[Generation, dict[str, Any], bool]] = []
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
            added.append((generation, spec, abort_after is not None))
            if abort_after is not None:
                aborts.setdefault(int(now_s[0]) + abort_after, []).append(generation)
        while harness.engine.has_work:
            step()
            assert now_s[0] < 20_000
    for generation, spec, is_aborted in added:
        has_deadline = spec["deadline_s"] is not None
        check_end(
            harness.events[generation], run_alone(spec), is_aborted=is_aborted, has_deadline=has_deadline
        )
    assert_idle(harness.engine.scheduler)
