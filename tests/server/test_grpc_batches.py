"""Calls that are reset leave nothing behind in grpc.aio."""

from __future__ import annotations

import asyncio
import gc
import statistics
import sys
from collections.abc import AsyncIterator
from itertools import pairwise

import grpc
import pytest
from grpc import aio
from grpc._cython import cygrpc  # type: ignore[attr-defined]

from fusionserve.config import ServerConfig
from fusionserve.server import grpc_batches
from fusionserve.server.grpc_server import GrpcServer
from fusionserve.server.memory_collector import MemoryCollector

METHOD = "/test.Test/Wait"
NUM_CALLS = 5000
# In a process of its own: what a client holds is none of this.
RESETS = f"""
import asyncio, sys
from grpc import aio

async def main():
    async with aio.insecure_channel(sys.argv[1]) as channel:
        method = channel.unary_stream("{METHOD}")
        for _ in range({NUM_CALLS // 50}):
            calls = [method(b"text") for _ in range(50)]
            await asyncio.sleep(0)  # they are sent
            for call in calls:
                call.cancel()
            await asyncio.sleep(0)
        await asyncio.sleep(0.5)

asyncio.run(main())
"""


async def wait(request: bytes, context: object) -> AsyncIterator[bytes]:
    yield request
    await asyncio.sleep(60)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = aio.server()
    handlers = {"Wait": grpc.unary_stream_rpc_method_handler(wait)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


@pytest.fixture
def mended() -> None:
    grpc_batches.mend_batches()
    assert cygrpc.execute_batch is grpc_batches._execute, "this release of grpcio is not known"


async def left_by_resets(address: str) -> float:
    """Bytes that a call leaves on the server's heap if it is reset before it is answered."""
    sizes = []
    for _ in range(5):
        client = await asyncio.create_subprocess_exec(sys.executable, "-P", "-c", RESETS, address)
        assert await client.wait() == 0
        await asyncio.sleep(1)
        sizes.append(heap_used_bytes())
    steps = [later - earlier for earlier, later in pairwise(sizes[1:])]
    return statistics.median(steps) / NUM_CALLS


def heap_used_bytes() -> float:
    gc.collect()
    families = {family.name: family for family in MemoryCollector().collect()}
    return families["fusionserve_heap_used_bytes"].samples[0].value


@pytest.mark.usefixtures("mended")
async def test_resets_leave_nothing(address: str) -> None:
    assert await left_by_resets(address) < 40  # else it is 90


@pytest.mark.usefixtures("mended")
async def test_calls_are_answered(address: str) -> None:
    async with aio.insecure_channel(address) as channel:
        call = channel.unary_stream(METHOD)(b"text")
        assert await call.read() == b"text"
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.read()


@pytest.mark.usefixtures("mended")
async def test_failed_batch_raises(address: str) -> None:
    async with aio.insecure_channel(address) as channel:
        call = channel.unary_stream("/test.Test/None")(b"text")
        with pytest.raises(aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_server_has_it_mended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cygrpc, "execute_batch", grpc_batches._execute_batch)
    server = GrpcServer(ServerConfig(listen="127.0.0.1:0"), max_open_requests=8)
    await server.stop(0)
    assert cygrpc.execute_batch is grpc_batches._execute


async def test_another_release_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cygrpc, "execute_batch", grpc_batches._execute_batch)
    monkeypatch.setattr(grpc, "__version__", "1.99.0")
    grpc_batches.mend_batches()
    assert cygrpc.execute_batch is grpc_batches._execute_batch
