"""Adapters copied beside the steps: who waits for a copy, who does not, and what is copied before its turn."""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

import pytest
import torch
from delayed_copies import DelayedCopies
from fake_runner import EngineHarness, expected_tokens
from schedules import (
    assert_idle,
    complete,
    first_not_to_pass,
    make_adapter,
    make_generation,
    make_request,
    make_scheduler,
    sizes,
)

from fusionserve import metrics
from fusionserve.adapters.adapter import Adapter
from fusionserve.engine.engine_thread import EngineThread
from fusionserve.engine.pool_line import MOST_OVERTAKES
from fusionserve.engine.request import Request
from fusionserve.engine.scheduled_batch import ScheduledBatch
from fusionserve.engine.scheduler import _MAX_PREFETCHES, Scheduler
from fusionserve.errors import CapacityError, DeadlineError, InternalError
from fusionserve.generation import GenerationFinished

pytestmark = pytest.mark.no_kernels

QUIET = logging.CRITICAL + 1
NEVER = None  # by itself


class Steps:
    """A scheduler whose steps are computed, and whose copies are begun."""

    def __init__(self, num_questions: int | None = NEVER, **fields: Any) -> None:
        self.copies = DelayedCopies(num_questions)
        self.scheduler: Scheduler = make_scheduler(copies=self.copies, **fields)
        self.copied: list[str] = []

    def add(self, *requests: Request) -> None:
        for request in requests:
            self.scheduler.add(request)

    def step(self) -> ScheduledBatch:
        batch = self.scheduler.schedule()
        if batch.pool_changes:
            self.copies.join()
        for write in batch.copies:
            self.copied.append(write.resident.name)
            self.copies.begin(write.resident.uid, lambda: None)
        complete(self.scheduler, batch)
        self.scheduler.check_integrity()
        return batch

    def leave_idle(self, adapter: Adapter) -> None:
        """Has the adapter copied for a request that then goes."""
        used = make_request(prompt=[1], adapters=(adapter,))
        self.add(used)
        self.step()
        self.copies.finish()
        assert used in sizes(self.step())
        self.scheduler.remove(used)


def run_with(harness: EngineHarness, *generations: Any) -> None:
    harness.add(*generations)
    harness.run()
    assert_idle(harness.engine.scheduler)


def assert_expected(harness: EngineHarness, *generations: Any) -> None:
    for generation in generations:
        assert harness.tokens(generation) == expected_tokens(generation)


class TestWaiting:
    def test_request_waits_for_its_copy_and_others_do_not(self) -> None:
        steps = Steps()
        cold, base = make_request(prompt=[1], adapters=(make_adapter(),)), make_request(prompt=[2])
        steps.add(cold, base)
        for _ in range(3):
            batch = steps.step()
            assert set(sizes(batch)) == {base}
            assert batch.pool_changes == (), "nothing is copied in a step"
        assert steps.copies.num_begun == 1
        steps.copies.finish()
        assert cold in sizes(steps.step())
        assert steps.copies.num_begun == 1

    def test_copy_is_begun_in_the_step_that_first_asks_for_it(self) -> None:
        steps, adapter = Steps(), make_adapter()
        steps.add(make_request(adapters=(adapter,)))
        assert [write.resident for write in steps.step().copies] == [adapter]

    def test_requests_of_one_adapter_wait_for_one_copy(self) -> None:
        steps, adapter = Steps(), make_adapter()
        requests = [make_request(prompt=[n], adapters=(adapter,)) for n in range(3)]
        steps.add(*requests)
        steps.step()
        steps.copies.finish()
        assert set(sizes(steps.step())) == set(requests)
        assert steps.copies.num_begun == 1

    def test_request_is_overtaken_a_bounded_number_of_times(self) -> None:
        steps = Steps(max_batch_requests=2)
        there = make_adapter()
        steps.leave_idle(there)
        cold = make_request(prompt=[1], adapters=(make_adapter(),))
        steps.add(cold)
        passer, num_overtakes = first_not_to_pass(steps.scheduler, steps.step, there, 3 * MOST_OVERTAKES)
        assert num_overtakes == MOST_OVERTAKES
        steps.copies.finish()
        assert set(sizes(steps.step())) == {cold, passer}

    def test_blend_keeps_the_member_that_is_there_while_another_is_copied(self) -> None:
        steps = Steps(pool_ranks=24)
        there, missing, other = make_adapter(8), make_adapter(8), make_adapter(16)
        steps.leave_idle(there)
        blend = make_request(prompt=[2], adapters=(there, missing), arrival_s=0.0)
        greedy = make_request(prompt=[3], adapters=(other,))
        steps.add(blend, greedy)
        steps.step()
        assert steps.copied == [there.name, missing.name]
        steps.copies.finish()
        assert set(sizes(steps.step())) == {blend}

    def test_two_that_need_the_whole_pool_are_copied_once_each(self) -> None:
        steps = Steps(num_questions=3, pool_ranks=8)
        requests = [make_request(prompt=[n], adapters=(make_adapter(8),)) for n in range(2)]
        steps.add(*requests)
        served = []
        for _ in range(20):
            for request in sizes(steps.step()):
                served.append(request)
                steps.scheduler.remove(request)
        assert served == requests
        assert steps.copies.num_begun == 2

    def test_copy_under_way_is_not_evicted_by_whom_it_is_in_the_way_of(self) -> None:
        steps = Steps(pool_ranks=8)
        early, urgent = (
            make_request(prompt=[n], adapters=(make_adapter(8),), priority=priority)
            for n, priority in enumerate((0, 1))
        )
        steps.add(early)
        steps.step()
        steps.add(urgent)
        steps.step()
        assert steps.copied == [early.generation.adapters[0].name]
        steps.copies.finish()
        assert sizes(steps.step()) == {}, "the urgent one takes the rows, and waits for its own copy"
        steps.copies.finish()
        assert set(sizes(steps.step())) == {urgent}

    def test_gaps_are_closed_under_a_copy_that_is_waited_for(self) -> None:
        harness = EngineHarness(copies=DelayedCopies(2), pool_ranks=24)
        low = make_generation(prompt=[1], adapters=(make_adapter(6),), max_new_tokens=8)
        kept = make_generation(prompt=[2], adapters=(make_adapter(10),), max_new_tokens=30)
        harness.add(low, kept)
        while harness.engine.scheduler.waiting:
            harness.step()
        while not any(isinstance(event, GenerationFinished) for event in harness.events[low]):
            harness.step()
        wide = make_generation(prompt=[3], adapters=(make_adapter(14),), max_new_tokens=2)
        run_with(harness, wide)
        assert any(batch.pool_changes for batch in harness.runner.batches), "nothing was moved"
        assert_expected(harness, low, kept, wide)

    def test_few_copies_are_begun_in_one_step(self) -> None:
        harness = EngineHarness(copies=DelayedCopies(1))
        generations = [make_generation(prompt=[n], adapters=(make_adapter(4),)) for n in range(8)]
        run_with(harness, *generations)
        assert max(len(batch.copies) for batch in harness.runner.batches) == 4
        assert_expected(harness, *generations)


class TestPrefetch:
    def test_next_in_turn_is_copied_while_the_batch_is_full(self) -> None:
        steps = Steps(max_batch_requests=1)
        running = make_request(prompt=[1])
        following = make_request(prompt=[2], adapters=(make_adapter(),))
        steps.add(running)
        steps.step()
        steps.add(following)
        before = metrics.ADAPTER_PREFETCHES._value.get()
        steps.step()
        assert metrics.ADAPTER_PREFETCHES._value.get() == before + 1
        steps.copies.finish()
        steps.scheduler.remove(running)
        assert set(sizes(steps.step())) == {following}, "it waits for nothing"

    def test_prefetch_is_bounded(self) -> None:
        steps = Steps(max_batch_requests=1)
        steps.add(make_request(prompt=[0], arrival_s=0.0))
        steps.step()
        waiting = [make_request(prompt=[n], adapters=(make_adapter(1),)) for n in range(1, 12)]
        steps.add(*waiting)
        for _ in range(9):
            steps.step()
            steps.copies.finish()
        assert steps.copied == [request.generation.adapters[0].name for request in waiting[:_MAX_PREFETCHES]]

    def test_prefetch_takes_nothing_that_is_held_or_next_in_turn(self) -> None:
        steps = Steps(max_batch_requests=1, pool_ranks=16)
        held, idle, second, third = (make_adapter(8) for _ in range(4))
        steps.leave_idle(idle)
        running = make_request(prompt=[1], adapters=(held,))
        steps.add(running)
        steps.step()
        steps.copies.finish()
        assert set(sizes(steps.step())) == {running}
        steps.add(*(make_request(prompt=[2], adapters=(adapter,)) for adapter in (second, third)))
        for _ in range(6):  # the same queue asks for the same things
            steps.step()
            steps.copies.finish()
        assert steps.copied == [idle.name, held.name, second.name]
        assert steps.scheduler.ledger.resident_uids == {held.uid, second.uid}

    def test_prefetch_may_move_what_runs(self) -> None:
        harness = EngineHarness(copies=DelayedCopies(1), pool_ranks=16, max_batch_requests=2)
        low = make_generation(prompt=[1], adapters=(make_adapter(6),), max_new_tokens=6)
        kept = make_generation(prompt=[2], adapters=(make_adapter(4),), max_new_tokens=30)
        harness.add(low, kept)
        while len(harness.engine.scheduler.running) < 2:
            harness.step()
        full = make_generation(prompt=[3], max_new_tokens=20)
        wide = make_generation(prompt=[4], adapters=(make_adapter(12),))
        run_with(harness, full, wide)
        moving = [batch for batch in harness.runner.batches if batch.pool_changes]
        assert {chunk.request.generation for batch in moving for chunk in batch.chunks} == {kept, full}
        assert_expected(harness, low, kept, full, wide)

    def test_prefetch_takes_no_row_that_the_first_in_turn_waits_for(self) -> None:
        steps = Steps(max_batch_requests=1, pool_ranks=16)
        running = make_request(prompt=[1], adapters=(make_adapter(8),))
        steps.add(running)
        steps.step()
        steps.copies.finish()
        steps.step()
        wide, small = (make_request(prompt=[2], adapters=(make_adapter(rank),)) for rank in (16, 4))
        steps.add(wide, small)
        steps.step()
        assert steps.copies.num_begun == 1
        steps.scheduler.remove(running)
        steps.step()
        assert steps.copied[1:] == [wide.generation.adapters[0].name]

    def test_nothing_is_prefetched_where_copies_are_made_in_the_step(self) -> None:
        scheduler = make_scheduler(max_batch_requests=1)
        scheduler.add(make_request(prompt=[1]))
        complete(scheduler, scheduler.schedule())
        scheduler.add(make_request(prompt=[2], adapters=(make_adapter(),)))
        batch = scheduler.schedule()
        assert (batch.pool_changes, batch.copies, scheduler.ledger.num_used) == ((), (), 0)


class TestEndings:
    def test_aborted_request_leaves_a_copy_that_another_may_use(self) -> None:
        harness = EngineHarness(copies=DelayedCopies(3))
        adapter = make_adapter()
        gone, again = (make_generation(adapters=(adapter,)) for _ in range(2))
        harness.add(gone)
        harness.step()
        harness.engine.abort(gone)
        assert_idle(harness.engine.scheduler)
        assert harness.released == [adapter]
        run_with(harness, again)
        assert_expected(harness, again)
        assert sum(len(batch.copies) for batch in harness.runner.batches) == 1

    def test_deadline_passes_while_the_copy_is_under_way(self) -> None:
        harness = EngineHarness(copies=DelayedCopies(NEVER))
        late = make_generation(adapters=(make_adapter(),), deadline_s=time.monotonic() + 0.01)
        harness.add(late)
        harness.step()
        time.sleep(0.02)
        harness.step()
        assert isinstance(harness.last(late), DeadlineError)
        assert_idle(harness.engine.scheduler)

    def test_rows_of_a_forgotten_copy_are_anothers(self) -> None:
        """The copy that nobody wants any more is made before the other's, in the same rows."""
        copies = DelayedCopies(3)
        harness = EngineHarness(copies=copies, pool_ranks=8)
        gone, other = (make_generation(adapters=(make_adapter(8),)) for _ in range(2))
        harness.add(gone)
        harness.step()
        uid = gone.adapters[0].uid
        harness.engine.abort(gone)
        harness.engine.forget(uid)
        assert copies.num_under_way == 1 and harness.engine.scheduler.ledger.num_used == 0
        run_with(harness, other)
        assert copies.num_begun == 2
        assert_expected(harness, other)

    def test_preempted_request_finds_its_adapter_where_it_was(self) -> None:
        harness = EngineHarness(copies=DelayedCopies(2), num_blocks=8)
        generations = [
            make_generation(prompt=[n] * 9, max_new_tokens=14, adapters=(make_adapter(),)) for n in range(4)
        ]
        run_with(harness, *generations)
        assert harness.engine.scheduler.num_preemptions > 0
        assert_expected(harness, *generations)


class TestFailures:
    @pytest.mark.parametrize("has_company", [False, True])
    @pytest.mark.parametrize("error", [RuntimeError("secret detail"), torch.OutOfMemoryError()])
    def test_copy_that_cannot_begin_ends_those_who_wait_for_it(
        self, error: Exception, has_company: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        harness = EngineHarness(copies=DelayedCopies(1))
        broken, sound = make_adapter(), make_adapter()
        company = [make_generation(), make_generation(adapters=(sound,))] if has_company else []
        harness.add(*company)
        harness.step()
        harness.runner.uncopied[broken] = error
        ended = [make_generation(adapters=(broken,)), make_generation(adapters=(sound, broken))]
        with caplog.at_level(QUIET):
            run_with(harness, *ended)
        kind = InternalError if isinstance(error, RuntimeError) and "secret" in str(error) else CapacityError
        for generation in ended:
            last = harness.last(generation)
            assert isinstance(last, kind) and "secret" not in last.message
        assert_expected(harness, *company)
        harness.runner.uncopied.clear()
        again = make_generation(adapters=(broken,))
        run_with(harness, again)
        assert_expected(harness, again)

    def test_other_copies_of_the_step_are_begun_nevertheless(self, caplog: pytest.LogCaptureFixture) -> None:
        harness = EngineHarness(copies=DelayedCopies(1))
        adapters = [make_adapter() for _ in range(3)]
        generations = [make_generation(adapters=(adapter,)) for adapter in adapters]
        harness.runner.uncopied[adapters[1]] = RuntimeError()
        with caplog.at_level(QUIET):
            run_with(harness, *generations)
        assert isinstance(harness.last(generations[1]), InternalError)
        assert_expected(harness, generations[0], generations[2])

    @pytest.mark.parametrize("loses_copies", [False, True])
    def test_failed_step_loses_no_copy(self, loses_copies: bool, caplog: pytest.LogCaptureFixture) -> None:
        harness = EngineHarness(copies=DelayedCopies(2))
        running = [make_generation(adapters=(make_adapter(),), max_new_tokens=20) for _ in range(3)]
        harness.add(*running)
        while harness.engine.scheduler.waiting:
            harness.step()
        cold = make_generation(adapters=(make_adapter(),))
        harness.add(cold)
        harness.runner.error, harness.runner.loses_copies = RuntimeError("once"), loses_copies
        with caplog.at_level(QUIET):
            harness.run()
        assert_idle(harness.engine.scheduler)
        assert_expected(harness, *running, cold)


class TestPace:
    @pytest.mark.parametrize("delay_s", [0.0, 0.03])
    def test_lone_cold_request_is_served_soon_and_without_spinning(self, delay_s: float) -> None:
        copies = TimedCopies(delay_s)
        harness = EngineHarness(copies=copies)
        generation = make_generation(adapters=(make_adapter(),), max_new_tokens=1)
        finished = threading.Event()

        def deliver(outputs: Any) -> None:
            harness.take(outputs)
            if any(isinstance(output.event, GenerationFinished) for output in outputs):
                finished.set()

        thread = EngineThread(harness.engine, deliver, finished.set)
        thread.start()
        thread.post(lambda _: harness.add(generation))
        assert finished.wait(20)
        thread.stop()
        assert_expected(harness, generation)
        num_steps, waited_s = len(harness.runner.batches), copies.waited_s
        assert num_steps <= waited_s / 0.001 + 3, "it spins"
        assert copies.num_answers >= min(5, delay_s / 0.01), "it sleeps for as long as without copies"


class TimedCopies(DelayedCopies):
    """Copies that take `delay_s` seconds each."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(NEVER)
        self._delay_s = delay_s
        self._begun_s = 0.0
        self.num_answers = 0
        self.waited_s = 0.0

    def begin(self, uid: int, write: Any) -> None:
        self._begun_s = time.monotonic()
        super().begin(uid, write)

    def is_done(self, uid: int) -> bool:
        self.num_answers += 1
        self.waited_s = time.monotonic() - self._begun_s
        if self.waited_s >= self._delay_s:
            self.finish()
        return super().is_done(uid)
