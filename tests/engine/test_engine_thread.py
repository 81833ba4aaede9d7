"""The thread around the engine: commands in, outputs out, an orderly end and a noticed death."""

import threading
import time
from collections.abc import Callable

import pytest
from fake_runner import EngineHarness, expected_tokens
from schedules import assert_idle, make_generation

from fusionserve.engine.engine import Output
from fusionserve.engine.engine_thread import EngineThread
from fusionserve.generation import GenerationFinished

pytestmark = pytest.mark.no_kernels

TIMEOUT_S = 20.0


class RunningThread:
    """An engine thread over a harness, stopped at the end of a with statement."""

    def __init__(self, harness: EngineHarness) -> None:
        self.harness = harness
        self.finished = threading.Event()
        self.died = threading.Event()
        self.thread_names: set[str] = set()
        self.num_steps = 0
        self.thread = EngineThread(harness.engine, self._deliver, self.died.set)
        step = harness.engine.step

        def counted() -> list[Output]:
            self.num_steps += 1
            return step()

        harness.engine.step = counted  # type: ignore[method-assign]

    def __enter__(self) -> "RunningThread":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.stop()

    def _deliver(self, outputs: list[Output]) -> None:
        self.thread_names.add(threading.current_thread().name)
        self.harness.take(outputs)
        if any(isinstance(output.event, GenerationFinished) for output in outputs):
            self.finished.set()


def until(condition: Callable[[], bool]) -> None:
    """Waits for something another thread does."""
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s, "waited in vain"
        time.sleep(0.002)


def test_posted_generation_runs_to_its_end_on_the_engine_thread() -> None:
    harness = EngineHarness()
    generation = make_generation()
    with RunningThread(harness) as running:
        running.thread.post(lambda _: harness.add(generation))
        assert running.finished.wait(TIMEOUT_S)
    assert harness.tokens(generation) == expected_tokens(generation)
    assert running.thread_names == {"engine"}
    assert_idle(harness.engine.scheduler)


def test_commands_run_in_order_before_the_next_step() -> None:
    harness = EngineHarness()
    order: list[int] = []
    done = threading.Event()
    with RunningThread(harness) as running:
        for number in range(50):
            running.thread.post(lambda _, number=number: order.append(number))
        running.thread.post(lambda _: done.set())
        assert done.wait(TIMEOUT_S)
    assert order == list(range(50))


def test_abort_reaches_a_busy_engine_within_a_step() -> None:
    harness = EngineHarness()
    generation = make_generation(max_new_tokens=100_000)
    steps_when_aborted: list[int] = []
    with RunningThread(harness) as running:
        running.thread.post(lambda _: harness.add(generation))
        until(lambda: running.num_steps > 3)

        def abort(_: object) -> None:
            harness.engine.abort(generation)
            steps_when_aborted.append(running.num_steps)

        running.thread.post(abort)
        until(lambda: bool(steps_when_aborted))
        time.sleep(0.05)
        assert running.num_steps == steps_when_aborted[0], "an idle engine steps"
    assert_idle(harness.engine.scheduler)


def test_idle_thread_sleeps() -> None:
    with RunningThread(EngineHarness()) as running:
        time.sleep(0.05)
        before_s = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before_s < 0.1
        assert running.num_steps == 0


def test_stalled_engine_is_tried_again_but_does_not_spin() -> None:
    harness = EngineHarness(num_blocks=4)
    blocks = harness.engine.scheduler.blocks
    elsewhere = blocks.allocate(4)
    assert elsewhere is not None
    with RunningThread(harness) as running:
        running.thread.post(lambda _: harness.add(make_generation(prompt=[1] * 8)))
        until(lambda: running.num_steps > 0)
        before, started_s = running.num_steps, time.monotonic()
        time.sleep(0.3)
        num_tries, waited_s = running.num_steps - before, time.monotonic() - started_s
        assert num_tries <= waited_s / 0.02 + 2
        running.thread.post(lambda _: blocks.free(elsewhere))
        assert running.finished.wait(TIMEOUT_S)
    assert num_tries > 0


def test_stop_ends_the_thread_with_work_left() -> None:
    harness = EngineHarness()
    running = RunningThread(harness)
    with running:
        running.thread.post(lambda _: harness.add(make_generation(max_new_tokens=100_000)))
        until(lambda: running.num_steps > 3)
    num_steps = running.num_steps
    time.sleep(0.05)
    assert running.num_steps == num_steps
    assert not running.died.is_set()
    running.thread.stop()  # again is fine


def test_stop_before_start_returns() -> None:
    running = RunningThread(EngineHarness())
    running.thread.stop()
    assert running.num_steps == 0


@pytest.mark.parametrize("where", ["command", "step"])
def test_death_is_told_once_and_stop_still_returns(where: str) -> None:
    harness = EngineHarness()

    def fail(*_: object) -> None:
        raise RuntimeError("broken beyond repair")

    with RunningThread(harness) as running:
        if where == "step":
            harness.engine.scheduler.schedule = fail  # type: ignore[method-assign]
            running.thread.post(lambda _: harness.add(make_generation()))
        else:
            running.thread.post(fail)
        assert running.died.wait(TIMEOUT_S)
    running.thread.post(fail)
    running.thread.stop()
