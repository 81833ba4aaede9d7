"""What is scheduled before the last step is read is what `schedule` chooses after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from delayed_copies import DelayedCopies
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import BLOCK_SIZE, complete, make_adapter, make_request, make_scheduler

from fusionserve.engine.fair_queue import Rank
from fusionserve.engine.request import Request
from fusionserve.engine.scheduled_batch import ScheduledBatch
from fusionserve.engine.scheduler import Scheduler

pytestmark = pytest.mark.no_kernels

Planned = dict[tuple[str, int], tuple[int, int, tuple[int, ...]]]


def planned(batch: ScheduledBatch) -> Planned:
    """The chunks, by request."""
    return {
        (chunk.request.generation.request_id, chunk.request.index): (
            chunk.start,
            chunk.num_tokens,
            chunk.row_starts,
        )
        for chunk in batch.chunks
    }


def finish_step(scheduler: Scheduler, batch: ScheduledBatch) -> None:
    """Each gets a token; those that have their last leave."""
    complete(scheduler, batch)
    for chunk in batch.chunks:
        if chunk.request.num_generated >= chunk.request.generation.max_new_tokens:
            scheduler.remove(chunk.request)


def chosen_after(scheduler: Scheduler, batch: ScheduledBatch) -> tuple[ScheduledBatch, list[Rank]]:
    """What a copy of the scheduler chooses once the batch is finished, and whose turn it is then."""
    other, others_batch = copy.deepcopy((scheduler, batch))
    finish_step(other, others_batch)
    return other.schedule(), ranks(other)


def ranks(scheduler: Scheduler) -> list[Rank]:
    return [scheduler._service.rank(request) for request in scheduler.waiting]


def is_plain(batch: ScheduledBatch) -> bool:
    return not (batch.pool_changes or batch.copies) and all(chunk.is_plain for chunk in batch.chunks)


def decoding(scheduler: Scheduler, *requests: Request) -> ScheduledBatch:
    """The first step in which all of them decode."""
    for request in requests:
        scheduler.add(request)
    while not (is_plain(batch := scheduler.schedule()) and len(batch.chunks) == len(requests)):
        complete(scheduler, batch)
    return batch


ADAPTERS = tuple(make_adapter(rank, f"a{rank}") for rank in (1, 2, 8))

requests = st.builds(
    lambda prompt, length, which, num_tokens, priority: {
        "prompt": [prompt] * length,
        "adapters": ADAPTERS[which : which + 1],
        "max_new_tokens": min(num_tokens, 40 - length),
        "priority": priority,
    },
    st.integers(1, 3),
    st.integers(1, 12),
    st.integers(0, len(ADAPTERS)),
    st.integers(1, 30),
    st.sampled_from([0, 0, 0, 1]),
)


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 5]), requests), min_size=1, max_size=10),
    num_blocks=st.integers(40 // BLOCK_SIZE, 40),
    max_batch_requests=st.integers(1, 4),
    max_batch_tokens=st.integers(1, 16),
    pool_ranks=st.integers(8, 16),
    copies=st.one_of(st.none(), st.builds(DelayedCopies, st.integers(0, 2))),
)
def test_it_is_what_would_be_chosen_once_everything_is_read(
    arrivals: list[tuple[int, dict[str, Any]]], copies: DelayedCopies | None, **limits: Any
) -> None:
    scheduler = make_scheduler(copies=copies, **limits)
    waits = [wait for wait, _ in arrivals]
    ahead: ScheduledBatch | None = None
    for _ in range(400):
        while waits and waits[0] <= 0:
            waits.pop(0)
            scheduler.add(make_request(**arrivals[-len(waits) - 1][1]))
        waits[:1] = [wait - 1 for wait in waits[:1]]
        if ahead is None and not waits and not list(scheduler.requests()):
            return
        batch = ahead or scheduler.schedule()
        ahead = None
        for write in batch.copies:
            assert copies is not None
            copies.begin(write.resident.uid, lambda: None)
        if is_plain(batch):
            then, ranks_then = chosen_after(scheduler, batch)
            ahead = scheduler.schedule_ahead(batch)
            scheduler.check_integrity()
            if ahead is not None:
                assert planned(ahead) == planned(then) and not scheduler._has_yielded
                assert ranks(scheduler) == ranks_then
                assert is_plain(then) or not then.pool_changes
        finish_step(scheduler, batch)
    raise AssertionError("it does not end")


def test_blocks_are_there_for_a_token_that_nobody_knows_yet() -> None:
    scheduler = make_scheduler()
    request = make_request(prompt=[1] * (BLOCK_SIZE - 1), max_new_tokens=9)
    batch = decoding(scheduler, request)
    assert len(request.blocks) == 1
    ahead = scheduler.schedule_ahead(batch)
    assert ahead is not None and len(request.blocks) == 2
    (chunk,) = ahead.chunks
    assert (chunk.start, chunk.end, chunk.num_generated) == (BLOCK_SIZE, BLOCK_SIZE + 1, 2)
    again = scheduler.schedule_ahead(batch)
    assert again == ahead and len(request.blocks) == 2, "what was not launched costs no second block"


def test_blocks_of_others_are_not_taken() -> None:
    scheduler = make_scheduler(num_blocks=2)
    requests = [make_request(prompt=[n] * (BLOCK_SIZE - 1), max_new_tokens=9) for n in (1, 2)]
    batch = decoding(scheduler, *requests)
    assert scheduler.schedule_ahead(batch) is None
    assert scheduler.num_preemptions == 0 and all(len(request.blocks) == 1 for request in requests)


def test_nothing_is_scheduled_past_one_who_is_not_in_the_step() -> None:
    scheduler = make_scheduler()
    batch = decoding(scheduler, *(make_request(prompt=[n], max_new_tokens=9) for n in (1, 2)))
    assert scheduler.schedule_ahead(ScheduledBatch(batch.chunks[:1], ())) is None
    assert scheduler.schedule_ahead(batch) is not None


def test_one_who_waits_for_room_does_not_wait_for_a_chain_of_steps() -> None:
    scheduler = make_scheduler(max_batch_requests=2)
    batch = decoding(scheduler, *(make_request(prompt=[n], max_new_tokens=9) for n in (1, 2)))
    scheduler.add(make_request(prompt=[3]))
    assert scheduler.schedule_ahead(batch) is None, "it was not looked at"
    complete(scheduler, batch)
    batch = scheduler.schedule()
    assert len(batch.chunks) == 2 and scheduler.schedule_ahead(batch) is not None
    scheduler.remove(batch.chunks[0].request)
    assert scheduler.schedule_ahead(batch.still_running) is None, "there is room"


def test_nobody_sits_out_a_step_ahead() -> None:
    scheduler = make_scheduler()
    batch = decoding(scheduler, make_request(prompt=[1], max_new_tokens=9))
    scheduler._has_yielded = True
    assert scheduler.schedule_ahead(batch) is not None and not scheduler._has_yielded


def test_copies_for_those_who_wait_are_all_begun_first() -> None:
    copies = DelayedCopies()
    scheduler = make_scheduler(max_batch_requests=1, copies=copies)
    batch = decoding(scheduler, make_request(prompt=[1], max_new_tokens=99))
    for n in range(2, 5):  # two adapters each: more than are begun in a step
        scheduler.add(make_request(prompt=[n], adapters=(make_adapter(), make_adapter())))
    num_begun = []
    while (ahead := scheduler.schedule_ahead(batch)) is None:
        complete(scheduler, batch)
        batch = scheduler.schedule()
        num_begun.append(len(batch.copies))
        for write in batch.copies:
            copies.begin(write.resident.uid, lambda: None)
    assert num_begun == [4, 2]
    assert len(ahead.chunks) == 1 and len(scheduler.waiting) == 3
