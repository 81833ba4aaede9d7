"""What fails in a step that was launched before the last one was read, or in that one."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_runner import expected_tokens
from late_runner import LateHarness
from schedules import assert_idle, make_adapter, make_generation

from fusionserve.engine.request import Generation
from fusionserve.errors import CapacityError, InternalError

pytestmark = pytest.mark.no_kernels

QUIET = logging.CRITICAL + 1
MOMENTS = pytest.mark.parametrize("moment", ["launch", "read"])


def started(moment: str, num_generations: int) -> tuple[LateHarness, list[Generation]]:
    """Generations that decode, the next step launched; what is then set to fail does so at this moment."""
    harness = LateHarness()
    generations = [
        make_generation(adapters=(make_adapter(),), max_new_tokens=12) for _ in range(num_generations)
    ]
    harness.runner.fails_at = moment
    harness.start(*generations)
    return harness, generations


@MOMENTS
@pytest.mark.parametrize("culprit", range(4))
def test_only_the_culprit_ends(moment: str, culprit: int, caplog: pytest.LogCaptureFixture) -> None:
    harness, generations = started(moment, 4)
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
    harness, generations = started(moment, 3)
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
    harness, generations = started(moment, 4)
    harness.runner.max_requests = 3
    with caplog.at_level(QUIET):
        harness.run()
    *kept, newest = generations
    assert [harness.tokens(g) for g in kept] == [expected_tokens(g) for g in kept]
    error = harness.last(newest)
    assert isinstance(error, CapacityError) and error.reason == "OUT_OF_MEMORY"


@MOMENTS
def test_lost_device_ends_the_engine(moment: str) -> None:
    harness, _ = started(moment, 1)
    harness.runner.error = torch.AcceleratorError("the device is gone")
    with pytest.raises(torch.AcceleratorError):
        harness.step()
