"""Clients that are gone without a word: what they held is free soon, though their generations would go on for long."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from beset_server import BesetServer, beset_server, healthy_beside

from fusionserve.client import AsyncClient, GenerationChunk
from fusionserve.config import ServerConfig
from fusionserve.loadtest.hostile.target import LONG, PROMPT
from fusionserve.loadtest.slots_freed import (
    after_cut,
    after_freeze,
    after_kill,
    tokens_after_cancel,
    until_free,
)

STEP_S = 0.02  # 900 of them take 18 s
KEEPALIVE_S = 1.0
FLAGS = ("--keepalive-time", f"{KEEPALIVE_S}s", "--keepalive-timeout", f"{KEEPALIVE_S}s")
SLACK_S = 1.5

# grpc.aio serves one event loop at a time well.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def server() -> Iterator[BesetServer]:
    with beset_server(*FLAGS, failpoints=f"engine.step=sleep({STEP_S})") as server:
        yield server


async def test_killed_client_holds_nothing_a_second_later(server: BesetServer) -> None:
    assert await after_kill(server.target) < 1


@pytest.mark.parametrize("event", [after_freeze, after_cut], ids=["frozen", "cable cut"])
async def test_silent_client_holds_nothing_once_its_ping_is_overdue(server: BesetServer, event) -> None:  # type: ignore[no-untyped-def]
    assert KEEPALIVE_S / 2 < await event(server.target) < 2 * KEEPALIVE_S + SLACK_S


async def test_clients_that_answer_pings_are_left_alone_however_slow(server: BesetServer) -> None:
    async with healthy_beside(server), AsyncClient(server.process.grpc) as client:
        stream = client.stream(PROMPT, **{**LONG, "max_new_tokens": 80})
        await asyncio.sleep(2 * KEEPALIVE_S + SLACK_S)  # nothing is read, and then all of it
        tokens = [t async for e in stream if isinstance(e, GenerationChunk) for t in e.token_ids]
    assert len(tokens) == 80


async def test_cancelled_stream_is_computed_no_further(server: BesetServer) -> None:
    await until_free(server.target)
    # One step may be under way as the news comes, and one more as it is passed on.
    assert 0 <= await tokens_after_cancel(server.target) <= 3
    assert await until_free(server.target) < 1


async def test_defaults_notice_a_silent_client_within_ten_seconds() -> None:
    config = ServerConfig()
    assert config.keepalive_time_s + config.keepalive_timeout_s < 10
