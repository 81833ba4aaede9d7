"""A server that is gone without a word, as a machine without power is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from server_fixture import Served, serving_server

from fusionserve.client import AsyncClient, Client, Generation, UnavailableError, channel
from fusionserve.loadtest.hostile.cable import Cable
from fusionserve.server import grpc_server

SOON_S = 10.0


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving_server() as server:
        yield server


@pytest.fixture
async def cable(served: Served, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cable]:
    monkeypatch.setattr(channel, "KEEPALIVE_TIME_S", 0.5)
    monkeypatch.setattr(channel, "KEEPALIVE_TIMEOUT_S", 0.5)
    address = served.app.grpc_address
    async with Cable(address.host, address.port) as cable:
        yield cable


async def test_async_stream_ends_with_unavailable(served: Served, cable: Cable) -> None:
    served.engine.gate = asyncio.Event()
    async with AsyncClient(cable.address) as client, client.stream("x") as events:
        await anext(events)
        cable.cut()
        async with asyncio.timeout(SOON_S):
            with pytest.raises(UnavailableError):
                await anext(events)


async def test_sync_stream_ends_with_unavailable(served: Served, cable: Cable) -> None:
    served.engine.gate = asyncio.Event()

    def use() -> None:
        with Client(cable.address) as client, client.stream("x") as events:
            next(events)
            loop.call_soon_threadsafe(cable.cut)
            with pytest.raises(UnavailableError):
                next(events)

    loop = asyncio.get_running_loop()
    async with asyncio.timeout(SOON_S):
        await asyncio.to_thread(use)


async def test_quiet_server_that_lives_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_server, "PERMITTED_PING_INTERVAL_S", 0.1)
    monkeypatch.setattr(channel, "KEEPALIVE_TIME_S", 0.2)
    async with serving_server() as served, AsyncClient(str(served.app.grpc_address)) as client:
        served.engine.gate = asyncio.Event()
        events = client.stream("x")
        await anext(events)
        await asyncio.sleep(
            5
        )  # gRPC pings once a second at most, and cuts off whoever pings too often the third time
        served.engine.gate.set()
        assert isinstance([event async for event in events][-1], Generation)


def test_server_permits_the_clients_pings() -> None:
    assert channel.KEEPALIVE_TIME_S > grpc_server.PERMITTED_PING_INTERVAL_S
