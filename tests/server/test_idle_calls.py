"""What a client can hold open at no cost to itself."""

from __future__ import annotations

import asyncio

import pytest
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_fixture import MAX_OPEN_REQUESTS, Served, to_failure

from fusionserve.server import idle_calls

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_FRAME_HEADER_BYTES = 9
_SETTINGS_BYTES = 6
_MAX_CONCURRENT_STREAMS = 3
WATCH = "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


async def settings_of(host: str, port: int) -> dict[int, int]:
    """What an HTTP/2 server tells of its limits in its first frame."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(_PREFACE)
    header = await reader.readexactly(_FRAME_HEADER_BYTES)
    data = await reader.readexactly(int.from_bytes(header[:3], "big"))
    writer.close()
    entries = (data[at : at + _SETTINGS_BYTES] for at in range(0, len(data), _SETTINGS_BYTES))
    return {int.from_bytes(entry[:2], "big"): int.from_bytes(entry[2:], "big") for entry in entries}


async def test_connection_carries_all_that_may_be_open_and_no_more_than_a_few_hundred_beside(
    served: Served,
) -> None:
    address = served.app.grpc_address
    limit = (await settings_of(address.host, address.port))[_MAX_CONCURRENT_STREAMS]
    assert MAX_OPEN_REQUESTS + 64 < limit < 2 * MAX_OPEN_REQUESTS + 512


async def test_watches_are_bounded_and_checks_are_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idle_calls, "MAX_IDLE_CALLS", {WATCH: 2})
    watches = [served.health.Watch(health_pb2.HealthCheckRequest()) for _ in range(2)]
    for watch in watches:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(aio.AioRpcError) as caught:
        await served.health.Watch(health_pb2.HealthCheckRequest()).read()
    failure = to_failure(caught.value)
    assert (failure.code.name, failure.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_IDLE_CALLS")
    assert failure.trailers["grpc-retry-pushback-ms"]
    assert (await served.health.Check(health_pb2.HealthCheckRequest())).status == 1

    watches[0].cancel()
    async with asyncio.timeout(5):
        while await _is_refused(served):
            await asyncio.sleep(0.01)


async def test_reflection_is_bounded(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle_calls, "MAX_IDLE_CALLS", {REFLECT: 1})
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    first = stub.ServerReflectionInfo()
    await first.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    await first.read()
    with pytest.raises(aio.AioRpcError) as caught:
        await stub.ServerReflectionInfo().read()
    assert to_failure(caught.value).reason == "TOO_MANY_IDLE_CALLS"


async def _is_refused(served: Served) -> bool:
    try:
        await served.health.Watch(health_pb2.HealthCheckRequest()).read()
    except aio.AioRpcError:
        return True
    return False
