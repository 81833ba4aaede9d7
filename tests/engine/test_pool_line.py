"""Who waits for rows of the adapter pool, who passes meanwhile, and that nobody waits for ever."""

from __future__ import annotations

import pytest
from fake_runner import EngineHarness, expected_tokens
from schedules import (
    add_running,
    assert_idle,
    first_not_to_pass,
    make_adapter,
    make_generation,
    make_request,
    make_scheduler,
    sizes,
)

from fusionserve.engine.pool_line import MOST_OVERTAKES

pytestmark = pytest.mark.no_kernels


def test_adapters_that_fit_together_share_a_step_and_others_wait() -> None:
    scheduler = make_scheduler(pool_ranks=16)
    fitting = [make_request(prompt=[n], adapters=(make_adapter(8),)) for n in range(2)]
    big = make_request(prompt=[8], adapters=(make_adapter(16),))
    base = make_request(prompt=[9])
    for request in (*fitting, big, base):
        scheduler.add(request)
    assert set(sizes(scheduler.schedule())) == {*fitting, base}
    scheduler.check_integrity()
    for request in fitting:
        scheduler.remove(request)
    assert big in sizes(scheduler.schedule())


def test_request_waiting_for_the_pool_is_overtaken_a_bounded_number_of_times() -> None:
    scheduler = make_scheduler(pool_ranks=16, max_batch_requests=2)
    holder = add_running(scheduler, prompt=[1], adapters=(make_adapter(8),))
    blocked = make_request(prompt=[2], adapters=(make_adapter(16),))
    scheduler.add(blocked)
    passer, num_overtakes = first_not_to_pass(
        scheduler, scheduler.schedule, make_adapter(8), 3 * MOST_OVERTAKES
    )
    assert num_overtakes == MOST_OVERTAKES
    scheduler.remove(holder)
    assert blocked in sizes(scheduler.schedule())
    scheduler.remove(blocked)
    assert passer in sizes(scheduler.schedule())


def test_only_who_would_take_its_rows_waits_behind_a_request_that_was_overtaken_often() -> None:
    scheduler = make_scheduler(pool_ranks=32, max_batch_requests=8)
    popular, rare = make_adapter(16), make_adapter(8)
    for adapter in (popular, popular, rare):
        add_running(scheduler, prompt=[1], adapters=(adapter,))
    blocked = make_request(prompt=[2], adapters=(make_adapter(16),))  # 8 rows are free, and 8 more will drain
    scheduler.add(blocked)
    _, passed = first_not_to_pass(scheduler, scheduler.schedule, make_adapter(8), 3 * MOST_OVERTAKES)
    assert passed == MOST_OVERTAKES
    others = [make_request(prompt=[4]), make_request(prompt=[5], adapters=(popular,))]
    late = make_request(prompt=[6], adapters=(rare,))
    for request in (*others, late):
        scheduler.add(request)
    planned = sizes(scheduler.schedule())
    assert planned.keys() >= set(others)
    assert not planned.keys() & {blocked, late}
    (holder,) = (r for r in scheduler.running if r.generation.adaptation.residents == (rare,))
    scheduler.remove(holder)
    assert {blocked, late} & sizes(scheduler.schedule()).keys() == {blocked}
    scheduler.check_integrity()


def test_requests_of_one_step_pass_no_more_often_than_those_of_many() -> None:
    scheduler = make_scheduler(
        num_blocks=400, pool_ranks=16, max_batch_tokens=400, max_batch_requests=2 * MOST_OVERTAKES
    )
    add_running(scheduler, prompt=[1], adapters=(make_adapter(8),))
    small = make_adapter(8)
    blocked = make_request(prompt=[2], adapters=(make_adapter(16),))
    passers = [make_request(prompt=[3], adapters=(small,)) for _ in range(MOST_OVERTAKES + 10)]
    for request in (blocked, *passers):
        scheduler.add(request)
    step = sizes(scheduler.schedule())
    assert [request in step for request in passers] == [True] * MOST_OVERTAKES + [False] * 10


def test_residents_that_the_waiting_request_needs_are_not_drained_for_it() -> None:
    scheduler = make_scheduler(pool_ranks=40, max_batch_requests=8)
    popular, rare = make_adapter(16), make_adapter(8)
    for adapter in (popular, popular, rare):
        add_running(scheduler, prompt=[1], adapters=(adapter,))
    scheduler.add(make_request(prompt=[2], adapters=(popular, make_adapter(24))))
    _, passed = first_not_to_pass(scheduler, scheduler.schedule, make_adapter(8), 3 * MOST_OVERTAKES)
    assert passed == MOST_OVERTAKES
    other = make_request(prompt=[5], adapters=(popular,))
    scheduler.add(other)
    assert other in sizes(scheduler.schedule())


@pytest.mark.parametrize("ends", ["admitted", "removed"])
def test_line_forgets_who_waits_no_more(ends: str) -> None:
    scheduler = make_scheduler(pool_ranks=16, max_batch_requests=4)
    holder = add_running(scheduler, prompt=[1], adapters=(make_adapter(8),))
    blocked = make_request(prompt=[2], adapters=(make_adapter(16),))
    for request in (blocked, make_request(prompt=[3])):
        scheduler.add(request)
    assert blocked not in sizes(scheduler.schedule())
    scheduler.check_integrity()
    scheduler.remove(holder if ends == "admitted" else blocked)
    assert (blocked in sizes(scheduler.schedule())) is (ends == "admitted")
    scheduler.check_integrity()


def test_request_waiting_for_the_pool_does_not_starve_behind_small_adapters() -> None:
    harness = EngineHarness(pool_ranks=16, max_batch_requests=2)
    small = [make_adapter(8) for _ in range(3)]

    def newcomer(number: int) -> None:
        generation = make_generation(prompt=[number % 40], adapters=(small[number % 3],), max_new_tokens=3)
        harness.add(generation)

    newcomer(0)
    newcomer(1)
    harness.step()
    big = make_generation(prompt=[7], adapters=(make_adapter(16),), max_new_tokens=2)
    harness.add(big)
    for number in range(2, 4 * MOST_OVERTAKES):
        newcomer(number)
        harness.step()
        if any(request.is_finished for request in big.requests):
            break
    assert harness.tokens(big) == expected_tokens(big)
    harness.run()
    assert_idle(harness.engine.scheduler)
