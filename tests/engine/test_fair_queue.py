"""Who comes next, and who gives way: no flow starves another, weights share, and nobody saves up service."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_runner import EngineHarness, expected_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from schedules import (
    assert_idle,
    complete,
    make_adapter,
    make_generation,
    make_request,
    make_scheduler,
    sizes,
)

from fusionserve import metrics
from fusionserve.engine.fair_queue import FairQueue, FlowService
from fusionserve.engine.request import Request
from fusionserve.engine.scheduler import Scheduler

pytestmark = pytest.mark.no_kernels

HOT, COLD, WARM = (make_adapter(4, name) for name in ("hot", "cold", "warm"))
ADAPTERS = {"hot": HOT, "cold": COLD, "warm": WARM}


def request_of(flow: str, **fields: object) -> Request:
    return make_request(**{"prompt": range(6), "max_new_tokens": 40, "adapters": (ADAPTERS[flow],), **fields})


def flood(scheduler: Scheduler, flow: str, count: int) -> list[Request]:
    requests = [request_of(flow) for _ in range(count)]
    for request in requests:
        scheduler.add(request)
    return requests


def served(scheduler: Scheduler, num_steps: int) -> Counter[str]:
    """Tokens computed for each flow."""
    tokens: Counter[str] = Counter()
    for _ in range(num_steps):
        batch = scheduler.schedule()
        scheduler.check_integrity()
        for chunk in batch.chunks:
            tokens[chunk.request.flow] += chunk.num_tokens
        complete(scheduler, batch)
    return tokens


@pytest.fixture
def busy() -> Scheduler:
    """Eight places, all taken by one flow, and a long queue of its."""
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64, max_batch_requests=8)
    flood(scheduler, "hot", 50)
    served(scheduler, 3)
    assert {request.flow for request in scheduler.running} == {"hot"} and len(scheduler.running) == 8
    return scheduler


def test_request_of_another_flow_is_computed_in_the_next_step(busy: Scheduler) -> None:
    cold = request_of("cold")
    newest = busy.running[-1]
    busy.add(cold)
    assert cold in sizes(busy.schedule())
    assert newest in busy.waiting and len(busy.running) == 8


def test_streams_of_the_crowding_flow_sit_out_the_step_of_a_newcomer(busy: Scheduler) -> None:
    newcomers = [request_of("cold"), request_of("warm")]
    for request in newcomers:
        busy.add(request)
    step = busy.schedule()
    assert sizes(step) == dict.fromkeys(newcomers, 6), "and nothing else is computed in it"
    complete(busy, step)
    third = make_request(prompt=range(6))
    busy.add(third)
    step = busy.schedule()
    assert len(step.chunks) == 8 and sizes(step)[third] == 6, "never two steps in a row"


def test_streams_sit_out_no_step_in_which_the_newcomer_is_not_computed() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64, max_batch_requests=8, pool_ranks=4)
    flood(scheduler, "hot", 50)
    served(scheduler, 3)
    scheduler.add(request_of("cold"))
    for _ in range(4):
        step = scheduler.schedule()
        assert Counter(chunk.request.flow for chunk in step.chunks)["hot"] == 8
        complete(scheduler, step)


def test_streams_sit_out_no_step_unless_their_flow_has_a_queue() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64, max_batch_requests=8)
    flood(scheduler, "hot", 6)
    served(scheduler, 4)
    scheduler.add(request_of("cold"))
    assert len(scheduler.schedule().chunks) == 7


def test_streams_sit_out_no_step_for_a_lower_priority() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64, max_batch_requests=9)
    urgent = [request_of("hot", priority=1) for _ in range(8)]
    for request in urgent:
        scheduler.add(request)
    served(scheduler, 3)
    flood(scheduler, "hot", 2)
    cold = request_of("cold")
    scheduler.add(cold)
    step = sizes(scheduler.schedule())
    assert cold in step and step.keys() >= set(urgent)


def test_streams_sit_out_no_step_for_a_flow_with_half_as_much(busy: Scheduler) -> None:
    flood(busy, "cold", 3)
    served(busy, 4)
    cold = request_of("cold")
    busy.add(cold)
    step = sizes(busy.schedule())
    assert cold in step and len(step) == 8


def test_flows_share_places_and_then_none_takes_anothers(busy: Scheduler) -> None:
    flood(busy, "cold", 20)
    served(busy, 4)
    before = busy.num_preemptions
    assert Counter(request.flow for request in busy.running) == {"hot": 4, "cold": 4}
    served(busy, 10)
    assert busy.num_preemptions == before


def test_lone_flow_is_never_preempted_for_itself(busy: Scheduler) -> None:
    served(busy, 20)
    assert busy.num_preemptions == 0


def test_step_preempts_few_for_flows_that_have_less() -> None:
    scheduler = make_scheduler(num_blocks=800, max_batch_tokens=160, max_batch_requests=16)
    flood(scheduler, "hot", 50)
    served(scheduler, 3)
    assert len(scheduler.running) == 16 and scheduler.num_preemptions == 0
    flood(scheduler, "cold", 10)
    scheduler.schedule()
    assert scheduler.num_preemptions == 4, "although a fair share is eight places"


def test_lower_priority_takes_no_place(busy: Scheduler) -> None:
    busy.add(request_of("cold", priority=-1))
    served(busy, 5)
    assert {request.flow for request in busy.running} == {"hot"}


def test_long_prompts_of_one_flow_do_not_hold_up_another() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=16, max_batch_requests=8)
    for _ in range(4):
        scheduler.add(request_of("hot", prompt=range(200)))
    served(scheduler, 3)
    cold = request_of("cold")
    scheduler.add(cold)
    assert sizes(scheduler.schedule())[cold] == 6


def test_flow_short_of_blocks_gets_them_from_the_one_that_has_most() -> None:
    scheduler = make_scheduler(num_blocks=24, max_batch_tokens=64, max_batch_requests=8)
    flood(scheduler, "hot", 8)
    served(scheduler, 4)
    assert scheduler.blocks.num_free == 0
    cold = request_of("cold", prompt=range(12))
    scheduler.add(cold)
    served(scheduler, 3)
    assert cold in scheduler.running, "and the newest request is not the one to give way"


@pytest.mark.parametrize(("weights", "share"), [({}, 1 / 2), ({"hot": 3.0}, 3 / 4), ({"cold": 3.0}, 1 / 4)])
def test_backlogged_flows_get_tokens_by_weight(weights: dict[str, float], share: float) -> None:
    scheduler = make_scheduler(
        num_blocks=400, max_batch_tokens=64, max_batch_requests=8, fair_weights=weights
    )
    for flow in ("hot", "cold"):
        flood(scheduler, flow, 60)
    tokens = served(scheduler, 60)
    assert tokens["hot"] / tokens.total() == pytest.approx(share, abs=0.06)


def test_idle_flow_saves_up_nothing() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64, max_batch_requests=4)
    flood(scheduler, "warm", 1)
    flood(scheduler, "hot", 30)
    served(scheduler, 30)
    flood(scheduler, "cold", 30)
    tokens = served(scheduler, 30)
    assert tokens["hot"] > tokens["cold"] / 2, "the newcomer does not catch up on what it never asked for"


def test_flow_is_charged_for_what_is_computed() -> None:
    scheduler = make_scheduler(num_blocks=400, max_batch_tokens=64, max_batch_requests=8)
    hot = flood(scheduler, "hot", 50)[-1]
    tokens = served(scheduler, 3)
    before = metrics.PREEMPTIONS.labels("turn")._value.get()
    for _ in range(
        3
    ):  # at two of them hot's streams do not sit the step out, and the newest loses its place in it
        flood(scheduler, "cold", 1)
        tokens += served(scheduler, 1)
    assert scheduler.num_preemptions == 3
    assert metrics.PREEMPTIONS.labels("turn")._value.get() == before + 3
    assert scheduler.waiting.service.rank(hot)[1] == tokens["hot"]


def test_flow_begins_to_wait_where_the_last_turn_was() -> None:
    service = FlowService()
    queue = FairQueue(service)
    first, second, late = (request_of(flow) for flow in ("hot", "warm", "cold"))
    for request in (first, second):
        service.enter(request.flow)
        queue.add(request)
    service.charge("warm", 50)
    service.advance()
    for request in (first, second):
        queue.remove(request)
        service.admit(request.flow)
    service.enter("cold")
    queue.add(late)
    assert service.rank(late) == (0, 50.0), "not where the step's first turn was"


def test_flow_that_has_gone_is_forgotten_once_the_others_have_had_as_much() -> None:
    service = FlowService()
    service.enter("stream")
    for number in range(100):
        service.advance()
        service.enter(f"visitor {number}")
        for flow in ("stream", f"visitor {number}"):
            service.charge(flow, 1)
        service.leave(f"visitor {number}")
    assert len(service._flows) <= 2


class ClosedLoop:
    """A flow that keeps `num_open` requests open: as one ends, the next comes."""

    def __init__(self, scheduler: Scheduler, name: str, num_open: int, max_new_tokens: int) -> None:
        self._scheduler = scheduler
        self._adapter = make_adapter(1, name)
        self._max_new_tokens = max_new_tokens
        for _ in range(num_open):
            self.send()

    def send(self) -> None:
        self._scheduler.add(make_request(max_new_tokens=self._max_new_tokens, adapters=(self._adapter,)))


def step_loops(scheduler: Scheduler, loops: dict[str, ClosedLoop]) -> Counter[str]:
    """One step, and a new request for each that ended; returns the tokens of each flow."""
    batch = scheduler.schedule()
    complete(scheduler, batch)
    tokens = Counter[str]()
    for request, num_tokens in sizes(batch).items():
        tokens[request.flow] += num_tokens
        if request.num_generated >= request.generation.max_new_tokens:
            scheduler.remove(request)
            loops[request.flow].send()
    return tokens


@pytest.mark.parametrize("num_open", [12, 8], ids=["queued", "all running"])
@pytest.mark.parametrize("beside", [[], ["one stream"]], ids=["alone", "beside a stream"])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_nobody_pays_for_what_nobody_waited_for(num_open: int, beside: list[str], weight: float) -> None:
    scheduler = make_scheduler(
        num_blocks=4000, max_batch_tokens=64, max_batch_requests=8, fair_weights={"first": weight}
    )
    loops = {name: ClosedLoop(scheduler, name, 1, 320) for name in beside}
    loops["first"] = ClosedLoop(scheduler, "first", num_open, 320)
    for _ in range(300):
        step_loops(scheduler, loops)
    loops |= {f"later {n}": ClosedLoop(scheduler, f"later {n}", 2, 20) for n in range(10)}
    tokens = Counter[str]()
    for _ in range(400):
        tokens += step_loops(scheduler, loops)
    fair = tokens.total() * weight / (10 + len(beside) + weight)
    scheduler.check_integrity()
    assert fair * 0.6 < tokens["first"] < fair * 1.5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(sorted(ADAPTERS)), st.integers(-1, 1)), max_size=12), st.data())
def test_turns_are_those_of_the_definition(wanted: list[tuple[str, int]], data: st.DataObject) -> None:
    """At each turn the least (-priority, service, arrival) of all that wait, with what was served since."""
    service = FlowService()
    queue = FairQueue(service)
    waiting = [request_of(flow, priority=priority) for flow, priority in wanted]
    for request in waiting:
        service.enter(request.flow)
        queue.add(request)
    for request in queue.in_turn():
        assert request is min(waiting, key=lambda r: (service.rank(r), r.order))
        waiting.remove(request)
        queue.remove(request)
        service.charge(request.flow, data.draw(st.integers(1, 50)))
        service.leave(request.flow)
    assert waiting == [] and len(queue) == 0


def test_every_token_is_right_under_fair_preemption() -> None:
    harness = EngineHarness(num_blocks=40, max_batch_requests=4)
    hot = [make_generation(prompt=[n] * 9, max_new_tokens=14, adapters=(HOT,)) for n in range(10)]
    harness.add(*hot)
    for _ in range(3):
        harness.step()
    cold = [make_generation(prompt=[n] * 9, max_new_tokens=14, adapters=(COLD,)) for n in range(3)]
    harness.add(*cold)
    harness.run()
    assert harness.engine.scheduler.num_preemptions > 0
    for generation in (*hot, *cold):
        assert harness.tokens(generation) == expected_tokens(generation)
    assert_idle(harness.engine.scheduler)
