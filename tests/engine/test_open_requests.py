"""How many requests may be open, and who gets the room."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress

import pytest

from fusionserve.engine.open_requests import OpenRequests, SharedRoom
from fusionserve.errors import AlreadyExistsError, CapacityError
from fusionserve.generation import Adaptation, AdapterTerm, GenerateParams, TokenPrompt

pytestmark = pytest.mark.no_kernels


def params(request_id: str, adapter: str = "a", tenant: str = "", num_candidates: int = 1) -> GenerateParams:
    return GenerateParams(
        request_id=request_id,
        prompt=TokenPrompt((1,)),
        adaptation=Adaptation("lora", (AdapterTerm(adapter),)),
        tenant=tenant,
        num_candidates=num_candidates,
    )


def fill(room: SharedRoom, flow: str, held: ExitStack, tenant: str = "") -> int:
    """Takes one by one until it is refused; how often it was not."""
    for taken in range(10_000):
        try:
            held.enter_context(room.taking(tenant, flow, 1))
        except CapacityError:
            return taken
    raise AssertionError("there is no end to the room")


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 64, 320])
def test_one_flow_alone_gets_the_limit(limit: int) -> None:
    room = SharedRoom(limit, "requests", "QUEUE_FULL")
    with ExitStack() as held:
        assert fill(room, "hot", held) == limit
    assert room.num_taken == 0


def test_flood_of_one_flow_leaves_room_for_others() -> None:
    room = SharedRoom(320, "requests", "QUEUE_FULL")
    with ExitStack() as held:
        assert fill(room, "hot", held) == 320
        shares = [fill(room, f"cold-{number}", held) for number in range(3)]
        assert shares == [64, 12, 3], "four fifths of what was left, each time"
        assert room.num_taken <= 400


def test_tenant_of_many_flows_leaves_room_for_others() -> None:
    room = SharedRoom(320, "requests", "QUEUE_FULL")
    with ExitStack() as held:
        crowd = sum(fill(room, f"hot-{number}", held, "crowd") for number in range(50))
        assert 390 < crowd <= 400
        assert fill(room, "cold", held, "other") >= 64
        assert fill(room, "hot-0", held, "third") > 0, "a flow is its tenant's"
        assert room.num_taken <= 500
    assert room.num_taken == 0


def test_tenant_alone_gets_the_limit_of_each_flow() -> None:
    room = SharedRoom(320, "requests", "QUEUE_FULL")
    with ExitStack() as held:
        assert fill(room, "hot", held, "a") == 320
        assert fill(room, "cold", held, "a") == 64


def test_flow_over_its_share_waits_until_it_is_below_again() -> None:
    room = SharedRoom(10, "requests", "QUEUE_FULL")
    with ExitStack() as others:
        fill(room, "cold", others)
        with ExitStack() as held:
            first = fill(room, "hot", held)
        assert 0 < first < 10
    with ExitStack() as held:
        assert fill(room, "hot", held) == 10


def test_request_larger_than_the_room_is_not_asked_to_come_again() -> None:
    room = SharedRoom(10, "tokens", "TOKENS_FULL")
    with pytest.raises(CapacityError) as caught, room.taking("", "a", 11):
        pass
    assert (caught.value.retry_after_s, caught.value.metadata) == (None, {"max": "10"})
    with room.taking("", "a", 8), pytest.raises(CapacityError) as caught, room.taking("", "a", 3):
        pass
    assert caught.value.retry_after_s is not None


def test_request_id_is_its_tenants() -> None:
    requests = OpenRequests(max_requests=8, max_tokens=100)
    with requests.opened(params("one", tenant="x")):
        with requests.opened(params("one", tenant="y")):
            pass
        with pytest.raises(AlreadyExistsError) as caught, requests.opened(params("one", tenant="x")):
            pass
        assert caught.value.reason == "REQUEST_ID_IN_USE"
    with requests.opened(params("one", tenant="x")):
        pass


def test_tenant_of_many_adapters_locks_nobody_out() -> None:
    requests = OpenRequests(max_requests=320, max_tokens=1000)
    with ExitStack() as held:
        for number in range(2000):
            crowd = params(str(number), adapter=f"a-{number // 400}", tenant="crowd")
            with suppress(CapacityError):
                held.enter_context(requests.opened(crowd))
                held.enter_context(requests.holding_tokens(crowd, 1))
        other = params("one", tenant="other")
        with requests.opened(other), requests.holding_tokens(other, 150):
            pass


def test_candidates_count_each() -> None:
    requests = OpenRequests(max_requests=4, max_tokens=100)
    with requests.opened(params("a", num_candidates=3)):
        with pytest.raises(CapacityError), requests.opened(params("b", num_candidates=2)):
            pass
        with requests.opened(params("c")):
            pass


async def test_idle_is_when_the_last_one_ends() -> None:
    requests = OpenRequests(max_requests=4, max_tokens=100)
    waiting = asyncio.create_task(requests.wait_idle())
    await asyncio.wait_for(waiting, 1)
    with requests.opened(params("a")):
        waiting = asyncio.create_task(requests.wait_idle())
        with requests.opened(params("b")):
            pass
        await asyncio.sleep(0)
        assert not waiting.done() and not requests.is_empty
    await asyncio.wait_for(waiting, 1)
    assert requests.is_empty
