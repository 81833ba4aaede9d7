"""What goes wrong in a step stays with the request it belongs to."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_runner import EngineHarness, expected_tokens
from schedules import assert_idle, make_adapter, make_generation

from fusionserve.engine.request import Generation
from fusionserve.errors import CapacityError, InternalError

pytestmark = pytest.mark.no_kernels

QUIET = logging.CRITICAL + 1


def run_with(harness: EngineHarness, *generations: Generation) -> None:
    harness.add(*generations)
    harness.run()
    assert_idle(harness.engine.scheduler)


def ended_by_memory(harness: EngineHarness, generations: list[Generation]) -> list[bool]:
    errors = [harness.last(generation) for generation in generations]
    return [isinstance(error, CapacityError) and error.reason == "OUT_OF_MEMORY" for error in errors]


@pytest.mark.parametrize("culprit", range(7))
def test_only_the_request_that_fails_ends(culprit: int, caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    generations = [make_generation(adapters=(make_adapter(),)) for _ in range(7)]
    harness.runner.poison[generations[culprit]] = RuntimeError("secret detail")
    with caplog.at_level(QUIET):
        run_with(harness, *generations)
    for index, generation in enumerate(generations):
        if index != culprit:
            assert harness.tokens(generation) == expected_tokens(generation)
    error = harness.last(generations[culprit])
    assert isinstance(error, InternalError)
    assert "secret" not in error.message
    assert error.metadata == {"request_id": generations[culprit].request_id}
    assert len(harness.released) == 7


def test_every_culprit_of_a_step_is_found(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    generations = [make_generation() for _ in range(8)]
    harness.runner.poison = {generations[index]: ValueError() for index in (0, 3, 4)}
    with caplog.at_level(QUIET):
        run_with(harness, *generations)
    failed = [isinstance(harness.last(generation), InternalError) for generation in generations]
    assert [index for index, is_failed in enumerate(failed) if is_failed] == [0, 3, 4]


def test_candidates_fail_together(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    bad, good = make_generation(num_candidates=3), make_generation()
    harness.runner.poison[bad] = RuntimeError()
    with caplog.at_level(QUIET):
        run_with(harness, bad, good)
    assert isinstance(harness.last(bad), InternalError)
    assert harness.tokens(good) == expected_tokens(good)


def test_failure_that_does_not_come_again_ends_nobody(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    generations = [make_generation() for _ in range(3)]
    harness.add(*generations)
    harness.step()
    harness.runner.error = RuntimeError("once")
    with caplog.at_level(QUIET):
        harness.run()
    assert [harness.tokens(g) for g in generations] == [expected_tokens(g) for g in generations]


def test_adapters_are_copied_again_after_a_step_that_lost_their_copies(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = EngineHarness()
    resident, lost = make_adapter(), make_adapter()
    run_with(harness, make_generation(adapters=(resident,)))
    harness.runner.error, harness.runner.loses_copies = RuntimeError("lost"), True
    ended, kept = make_generation(adapters=(lost,)), make_generation()
    with caplog.at_level(QUIET):
        run_with(harness, ended, kept)
    again = [make_generation(adapters=(adapter,)) for adapter in (lost, resident)]
    run_with(harness, *again)
    for generation in (ended, kept, *again):
        assert harness.tokens(generation) == expected_tokens(generation)


def test_out_of_memory_ends_the_newest_requests(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    generations = [make_generation() for _ in range(8)]
    harness.runner.max_requests = 4
    with caplog.at_level(QUIET):
        run_with(harness, *reversed(generations))  # the order of arrival counts, not that of the queue
    # One, then two more, then four more would be one too many: 8 - 1 - 2 - 4 = 1 is left.
    assert ended_by_memory(harness, generations) == [False] + [True] * 7
    assert harness.tokens(generations[0]) == expected_tokens(generations[0])
    error = harness.last(generations[7])
    assert error.retry_after_s is not None


def test_out_of_memory_spares_higher_priorities(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    low, high = make_generation(), make_generation(priority=5)
    harness.runner.max_requests = 1
    with caplog.at_level(QUIET):
        run_with(harness, low, high)
    assert ended_by_memory(harness, [low]) == [True]
    assert harness.tokens(high) == expected_tokens(high)


def test_request_without_memory_alone_ends_too(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    alone = make_generation()
    harness.runner.max_requests = 0
    with caplog.at_level(QUIET):
        run_with(harness, alone)
    assert ended_by_memory(harness, [alone]) == [True]


def test_lost_device_ends_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    generation = make_generation()
    harness.add(generation)
    harness.runner.poison[generation] = torch.AcceleratorError("the device is gone")
    with pytest.raises(torch.AcceleratorError):
        harness.step()


@pytest.mark.parametrize("error", [RuntimeError("secret detail"), MemoryError()])
def test_adapter_that_cannot_be_written_ends_those_who_hold_it_and_nobody_else(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    harness = EngineHarness()
    broken, others = make_adapter(), [make_adapter() for _ in range(3)]
    harness.runner.uncopied[broken] = error
    ended = [make_generation(adapters=(others[0], broken)), make_generation(adapters=(broken,))]
    kept = [make_generation(adapters=(adapter,)) for adapter in others]
    with caplog.at_level(QUIET):
        run_with(harness, kept[0], ended[0], kept[1], ended[1], kept[2])
    for generation in kept:
        assert harness.tokens(generation) == expected_tokens(generation)
    expected = CapacityError if isinstance(error, MemoryError) else InternalError
    assert all(isinstance(harness.last(generation), expected) for generation in ended)
    assert harness.num_written(broken) == 1, "one write shows that it cannot be made"
    assert broken.uid not in harness.engine.scheduler.ledger.resident_uids
    harness.runner.uncopied.clear()
    again = make_generation(adapters=(broken,))
    run_with(harness, again)
    assert harness.tokens(again) == expected_tokens(again)


def test_idle_adapter_that_cannot_be_written_again_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    harness = EngineHarness()
    idle, held = make_adapter(), make_adapter()
    run_with(harness, make_generation(adapters=(idle,)))
    harness.runner.error, harness.runner.loses_copies = RuntimeError("lost"), True
    harness.runner.uncopied[idle] = RuntimeError()
    generations = [make_generation(adapters=(held,)) for _ in range(3)]
    with caplog.at_level(QUIET):
        run_with(harness, *generations)
    assert [harness.tokens(g) for g in generations] == [expected_tokens(g) for g in generations]
    assert harness.engine.scheduler.ledger.resident_uids == {held.uid}


def test_adapters_that_cannot_be_written_beside_a_culprit_and_beside_each_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    harness = EngineHarness()
    generations = [make_generation(adapters=(make_adapter(),)) for _ in range(7)]
    for index in (1, 2, 5):
        harness.runner.uncopied[generations[index].adapters[0]] = RuntimeError()
    harness.runner.poison[generations[4]] = RuntimeError()
    with caplog.at_level(QUIET):
        run_with(harness, *generations)
    failed = [isinstance(harness.last(generation), InternalError) for generation in generations]
    assert [index for index, is_failed in enumerate(failed) if is_failed] == [1, 2, 4, 5]
