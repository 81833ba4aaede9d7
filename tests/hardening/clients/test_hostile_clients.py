"""Clients that break the rules: whatever they do, others get their tokens, and nothing stays held."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterator

import pytest
from beset_server import BesetServer, beset_server, healthy_beside

from fusionserve.client import AsyncClient, GenerateOptions, Generation
from fusionserve.loadtest.hostile.crowd import come_all_at_once
from fusionserve.loadtest.hostile.haste import CALLS, flood_with_resets, have_no_time
from fusionserve.loadtest.hostile.idle import stay_idle
from fusionserve.loadtest.hostile.kinds import KINDS
from fusionserve.loadtest.hostile.metadata import JUNK, TOO_LARGE, TOO_MANY, call_with_metadata
from fusionserve.loadtest.hostile.raw import PROTOCOLS, call_what_is_no_text, speak
from fusionserve.loadtest.hostile.readers import STREAMS
from fusionserve.loadtest.hostile.scrapers import PER_S, SECONDS, flood_with_scrapes
from fusionserve.loadtest.hostile.target import LONG, PROMPT
from fusionserve.server.idle_calls import MAX_IDLE_CALLS

# grpc.aio serves one event loop at a time well.
pytestmark = pytest.mark.asyncio(loop_scope="module")
FREE_WITHIN_S = 15.0
# The others have tests of their own.
KINDS_AT_ONCE = (
    "slow reader",
    "no room",
    "killed",
    "cancel early",
    "cancel midway",
    "cancel late",
    "silence",
)
UNREAD: GenerateOptions = {**LONG, "max_new_tokens": 400}
MAX_OPEN = 16 + 32
UNIMPLEMENTED = b"grpc-status\x0212"  # as HTTP/2 has it in the trailers
MAX_WATCHES = MAX_IDLE_CALLS["/grpc.health.v1.Health/Watch"]


@pytest.fixture(scope="module")
def server() -> Iterator[BesetServer]:
    with beset_server("--max-batch-requests", "16", "--max-queued-requests", "32") as server:
        yield server


async def test_others_get_their_tokens_and_nothing_stays_held(server: BesetServer) -> None:
    async with healthy_beside(server):
        await asyncio.gather(*(KINDS[kind](server.target) for kind in KINDS_AT_ONCE))
    await server.free_within(FREE_WITHIN_S)


async def test_no_time_is_a_deadline_and_no_work(server: BesetServer) -> None:
    before = await asyncio.to_thread(server.process.scrape)
    assert await have_no_time(server.target) == CALLS
    after = await asyncio.to_thread(server.process.scrape)
    tokens = "fusionserve_generated_tokens_total"
    assert after[tokens] - before[tokens] < CALLS  # a millisecond is enough for a step now and then


async def test_reader_that_never_reads_keeps_no_block_once_its_generation_has_ended(
    server: BesetServer,
) -> None:
    async with AsyncClient(server.process.grpc) as client:
        streams = [client.stream(PROMPT, adapter="perl", **UNREAD) for _ in range(STREAMS)]
        await asyncio.sleep(0.3)
        page = await asyncio.to_thread(server.process.scrape)
        assert page["fusionserve_requests_running"] == STREAMS
        assert page["fusionserve_adapter_leases"] == STREAMS
        await server.free_within(20)  # though nobody has read a message, or gone
        assert not any([stream._call.done() for stream in streams])
        *_, last = [event async for event in streams[0]]
        assert isinstance(last, Generation)
        assert len(last.token_ids) == UNREAD["max_new_tokens"]


@pytest.mark.parametrize(
    ("metadata", "status"),
    [(TOO_LARGE, "RESOURCE_EXHAUSTED"), (TOO_MANY, "RESOURCE_EXHAUSTED"), (JUNK, "OK")],
    ids=["17 kB", "500 keys", "-bin junk"],
)
async def test_metadata_has_a_limit(server: BesetServer, metadata: object, status: str) -> None:
    assert await call_with_metadata(server.target, metadata) == status  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_other_protocols_get_no_answer_of_theirs(server: BesetServer, protocol: str) -> None:
    answer = await speak(server.target.grpc_endpoint, PROTOCOLS[protocol])
    assert not answer.startswith((b"HTTP/1.1 200", b"\x16\x03"))
    assert await server.stream() == server.expected


async def test_calls_of_what_is_no_text_are_refused_and_others_go_on(server: BesetServer) -> None:
    async with AsyncClient(server.process.grpc) as connected, healthy_beside(server):
        for _ in range(10):
            for answer in await call_what_is_no_text(server.target):
                assert UNIMPLEMENTED in answer
        await connected.model()
        async with AsyncClient(server.process.grpc) as another:
            await another.model()


async def test_flood_of_resets_leaves_nothing_to_do(server: BesetServer) -> None:
    num_calls = await flood_with_resets(server.target)
    assert num_calls > 200
    await server.free_within(FREE_WITHIN_S)


async def test_idle_calls_are_refused_beyond_the_limit_and_harm_nobody(server: BesetServer) -> None:
    async with healthy_beside(server):
        told = await stay_idle(server.target)
    assert set(told) == {"OK", "RESOURCE_EXHAUSTED"}
    assert told["OK"] == MAX_WATCHES
    await server.free_within(FREE_WITHIN_S)


async def test_crowd_is_refused_beyond_the_limit_while_health_answers(server: BesetServer) -> None:
    crowd = await come_all_at_once(server.target)
    assert set(crowd.statuses) == {"OK", "RESOURCE_EXHAUSTED"}
    assert crowd.statuses.total() == 10_000
    assert crowd.statuses["OK"] >= MAX_OPEN
    assert statistics.median(crowd.healthy_s) < 1
    assert max(crowd.healthy_s) < 15
    await server.free_within(FREE_WITHIN_S)


async def test_scrape_flood_is_answered_from_few_renderings(server: BesetServer) -> None:
    seconds = await flood_with_scrapes(server.target)
    assert len(seconds) == PER_S * SECONDS
    assert statistics.median(seconds) < 0.1
