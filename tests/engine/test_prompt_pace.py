"""A step beside decoding streams takes the prompt tokens that keep it to its time, on fast machines and slow ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from schedules import complete, make_adapter, make_request, make_scheduler, sizes

from fusionserve.adapters.pool_ledger import WriteRows
from fusionserve.engine.prompt_pace import PromptPace
from fusionserve.engine.scheduled_batch import ScheduledBatch

pytestmark = pytest.mark.no_kernels

LEAST, STEP_S = 128, 0.06


def settle(pace: PromptPace, *, decode_s: float, token_s: float) -> int:
    """What it comes to on a machine whose steps take so long."""
    for _ in range(20):
        pace.observe(0, decode_s)
        num_tokens = pace.num_tokens
        pace.observe(num_tokens, decode_s + num_tokens * token_s)
    return pace.num_tokens


def test_first_step_takes_the_least() -> None:
    assert PromptPace(LEAST, STEP_S).num_tokens == LEAST


def test_fast_machine_fills_the_time() -> None:
    num_tokens = settle(PromptPace(LEAST, STEP_S), decode_s=0.01, token_s=0.0001)
    assert num_tokens == pytest.approx(500, abs=2)


@pytest.mark.parametrize(("decode_s", "token_s"), [(0.01, 0.001), (0.1, 0.0001)])
def test_slow_machine_still_takes_the_least(decode_s: float, token_s: float) -> None:
    assert settle(PromptPace(LEAST, STEP_S), decode_s=decode_s, token_s=token_s) == LEAST


def test_one_slow_step_is_forgotten() -> None:
    pace = PromptPace(LEAST, STEP_S)
    usual = settle(pace, decode_s=0.01, token_s=0.0001)
    pace.observe(usual, 2.0)
    assert pace.num_tokens == LEAST
    assert settle(pace, decode_s=0.01, token_s=0.0001) == pytest.approx(usual, rel=0.05)


def test_step_faster_than_those_without_prompts_teaches_no_miracle() -> None:
    pace = PromptPace(LEAST, STEP_S)
    pace.observe(0, 0.03)
    pace.observe(200, 0.02)
    assert LEAST <= pace.num_tokens <= 200 * STEP_S / (0.02 / 4)


def test_few_prompt_tokens_teach_nothing() -> None:
    pace = PromptPace(LEAST, STEP_S)
    pace.observe(2, 0.02)
    assert pace.num_tokens == LEAST


def test_steps_that_say_nothing_teach_nothing() -> None:
    """Where nothing was scheduled, or adapters were copied on the way."""
    scheduler = make_scheduler(max_batch_tokens=64, min_prompt_tokens=4, prompt_step_s=0.06)
    scheduler.observe(ScheduledBatch((), ()), 0.05)  # else a step without prompts
    first, second = make_request(prompt=range(8)), make_request(prompt=range(100, 150))
    scheduler.add(first)
    step = scheduler.schedule()
    complete(scheduler, step)
    scheduler.observe(step, 0.012)  # 1.5 ms a token
    scheduler.observe(replace(step, pool_changes=(WriteRows(make_adapter(), 0),)), 5.0)
    scheduler.observe(replace(step, copies=(WriteRows(make_adapter(), 0),)), 5.0)
    scheduler.add(second)
    assert sizes(scheduler.schedule()) == {first: 1, second: 40}


def test_scheduler_keeps_the_pace_that_it_observed() -> None:
    scheduler = make_scheduler(max_batch_tokens=64, min_prompt_tokens=4, prompt_step_s=0.06)
    first, second = make_request(prompt=range(8)), make_request(prompt=range(100, 150))
    scheduler.add(first)
    step = scheduler.schedule()
    complete(scheduler, step)
    scheduler.observe(step, 0.012)  # 1.5 ms a token
    scheduler.add(second)
    step = scheduler.schedule()
    assert sizes(step) == {first: 1, second: 40}
    assert step.num_prompt_tokens == 40
