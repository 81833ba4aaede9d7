"""From binding to the last answer: starting, health, draining, failing, signals."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fake_engine import FakeEngine, failing_loader
from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_fixture import ADAPTERS, INFERENCE, Failure, Served, serving_server, starting_server, to_failure

from fusionserve.config import ServerConfig
from fusionserve.errors import StartupError
from fusionserve.server.app import App
from fusionserve.v1 import adapter_pb2, inference_pb2

SUPPORT = Path(__file__).parent.parent / "support"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def health_of(served: Served, service: str = "") -> int:
    status: int = (await served.health.Check(health_pb2.HealthCheckRequest(service=service))).status
    return status


async def refused(served: Served) -> Failure:
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(inference_pb2.GenerateRequest(text="a"))
    return to_failure(caught.value)


@pytest.mark.parametrize("service", ["", INFERENCE, ADAPTERS])
async def test_health_is_not_serving_until_loaded(service: str) -> None:
    async with starting_server() as served:
        assert await health_of(served, service) == NOT_SERVING
        await served.load()
        assert served.engine.started
        assert await health_of(served, service) == SERVING


async def test_calls_are_refused_while_starting() -> None:
    async with starting_server() as served:
        failure = await refused(served)
        assert (failure.code.name, failure.reason) == ("UNAVAILABLE", "STARTING")
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
        with pytest.raises(aio.AioRpcError) as caught:
            await served.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
        assert to_failure(caught.value).reason == "STARTING"


async def test_health_of_an_unknown_service_is_not_found(served: Served) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await health_of(served, "other.Service")
    assert to_failure(caught.value).code.name == "NOT_FOUND"


async def test_watchers_see_every_change_and_the_end() -> None:
    async with starting_server() as served:
        first = served.health.Watch(health_pb2.HealthCheckRequest())
        second = served.health.Watch(health_pb2.HealthCheckRequest())
        assert (await first.read()).status == (await second.read()).status == NOT_SERVING
        first.cancel()
        await served.load()
        assert (await second.read()).status == SERVING
        await served.app.drain()
        assert (await second.read()).status == NOT_SERVING
        unknown = served.health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        start_s = time.monotonic()
        await served.app._grpc.stop(grace_s=20)
        assert time.monotonic() - start_s < 15  # open watches do not use up the grace
        with pytest.raises(aio.AioRpcError) as caught:
            await second.read()
        assert caught.value.code().name == "UNAVAILABLE"


async def test_draining_finishes_running_streams_and_refuses_new_requests(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    request = inference_pb2.StreamGenerateRequest(request=inference_pb2.GenerateRequest(text="a"))
    stream = served.inference.StreamGenerate(request)
    await stream.read()
    draining = asyncio.create_task(served.app.drain())
    while await health_of(served) == SERVING:
        await asyncio.sleep(0.005)
    failure = await refused(served)
    assert (failure.code.name, failure.reason) == ("UNAVAILABLE", "DRAINING")
    assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
    with pytest.raises(aio.AioRpcError) as caught:
        await served.adapters.LoadAdapter(adapter_pb2.LoadAdapterRequest(name="gamma"))
    assert to_failure(caught.value).reason == "DRAINING"
    await served.adapters.ListAdapters(adapter_pb2.ListAdaptersRequest())
    assert not draining.done()
    served.engine.gate.set()
    events = [await stream.read() for _ in range(5)]
    assert events[-1].HasField("finished")
    assert await stream.read() == aio.EOF
    await asyncio.wait_for(draining, 5)


async def test_idle_server_refuses_for_the_whole_window() -> None:
    async with serving_server(drain_window_s=0.3) as served:
        draining = asyncio.create_task(served.app.drain())
        await asyncio.sleep(0.15)
        failure = await refused(served)
        assert (failure.code.name, failure.reason) == ("UNAVAILABLE", "DRAINING")
        assert failure.trailers["grpc-retry-pushback-ms"] == "1000"
        assert not draining.done()
        await asyncio.wait_for(draining, 5)


async def test_draining_ends_what_outlasts_the_grace() -> None:
    async with serving_server(drain_grace_s=0.1) as served:
        served.engine.gate = asyncio.Event()
        request = inference_pb2.StreamGenerateRequest(request=inference_pb2.GenerateRequest(text="a"))
        stream = served.inference.StreamGenerate(request)
        await stream.read()
        await served.app.drain()
        assert served.engine.drain_grace_s == 0.1
        with pytest.raises(aio.AioRpcError) as caught:
            await stream.read()
        assert to_failure(caught.value).reason == "DRAINING"


async def test_dead_engine_means_not_serving(served: Served) -> None:
    served.engine.failed.set()
    await served.app.wait_failed()
    assert await health_of(served) == NOT_SERVING
    assert (await refused(served)).reason == "ENGINE_FAILED"


async def test_close_closes_the_engine() -> None:
    async with serving_server() as served:
        pass
    assert served.engine.closed


@pytest.mark.parametrize("enable_channelz", [False, True])
async def test_reflection_lists_the_services(enable_channelz: bool) -> None:
    async with serving_server(enable_channelz=enable_channelz) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        call = stub.ServerReflectionInfo(iter([request]))
        names = {service.name for service in (await call.read()).list_services_response.service}
        assert {INFERENCE, ADAPTERS, "grpc.health.v1.Health"} <= names
        call.cancel()


async def test_reflection_can_be_switched_off() -> None:
    async with serving_server(enable_reflection=False) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await stub.ServerReflectionInfo().read()  # writes nothing: a write could meet the end of the call
        assert caught.value.code().name == "UNIMPLEMENTED"


@pytest.mark.parametrize("field", ["listen", "metrics_listen"])
async def test_taken_port_is_a_startup_error_in_one_line(field: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        addresses = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0"}
        addresses[field] = f"127.0.0.1:{taken.getsockname()[1]}"
        start_s = time.monotonic()
        with pytest.raises(StartupError) as caught:
            App(ServerConfig(**addresses), max_open_requests=8)
        assert time.monotonic() - start_s < 10
    assert addresses[field] in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.reason == "LISTEN_FAILED"


@pytest.mark.parametrize("listen", ["", "50051", ":50051", "host:", "host:x", "host:65536", "::1:5", "[::1]"])
async def test_listen_address_must_be_host_and_port(listen: str) -> None:
    with pytest.raises(StartupError) as caught:
        App(ServerConfig(listen=listen), max_open_requests=8)
    assert caught.value.reason == "LISTEN_ADDRESS_INVALID"


@pytest.mark.parametrize("listen", ["nohost.invalid:1", "192.0.2.1:1"])
async def test_host_that_is_not_this_machine_is_named_as_such(listen: str) -> None:
    with pytest.raises(StartupError, match=f"cannot listen on {listen}: ") as caught:
        App(ServerConfig(listen=listen), max_open_requests=8)
    assert caught.value.reason == "LISTEN_FAILED"


async def test_failed_load_is_raised_by_load() -> None:
    async with starting_server() as served:
        with pytest.raises(StartupError, match="no such model"):
            await served.app.load(failing_loader(StartupError("no such model")))
        assert await health_of(served) == NOT_SERVING


MAIN = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[1])
from fake_engine import FakeEngine
from fusionserve.config import EngineConfig, ServerConfig
from fusionserve.server.app import serve

def load(config, labels):
    print("loading", flush=True)
    time.sleep(float(sys.argv[2]))
    engine = FakeEngine()
    if sys.argv[3] == "starts":  # by reading an adapter that takes long
        engine.start = lambda: asyncio.to_thread(time.sleep, 60)
        print("starting", flush=True)
    if sys.argv[3] == "fails":
        engine.failed.set()
    if sys.argv[3] == "hangs":
        engine.drain = lambda grace_s: asyncio.sleep(60)
    return engine

config = ServerConfig(listen="127.0.0.1:0", metrics_listen="127.0.0.1:0")
sys.exit(serve(EngineConfig(model="m", model_name="m"), config, load))
"""


@asynccontextmanager
async def process(load_s: float, behaviour: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """The server as a process of its own, with its first line read."""
    arguments = ("-P", "-W", "error", "-c", MAIN, str(SUPPORT), str(load_s), behaviour)
    pipe = asyncio.subprocess.PIPE
    server = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=pipe, stderr=pipe)
    try:
        assert server.stdout is not None
        assert await asyncio.wait_for(server.stdout.readline(), 20) == b"loading\n"
        yield server
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_stops_a_serving_process_with_success(number: signal.Signals) -> None:
    async with process(0, "works") as server:
        assert server.stdout is not None
        ready = (await asyncio.wait_for(server.stdout.readline(), 10)).decode()
        grpc_address = ready.split()[1].removeprefix("grpc=")
        assert ready == f"ready grpc={grpc_address} metrics={ready.split('metrics=')[1]}"
        async with aio.insecure_channel(grpc_address) as channel:
            served = Served(None, FakeEngine(), channel)  # type: ignore[arg-type]
            assert await health_of(served) == SERVING
            server.send_signal(number)
            out, err = await asyncio.wait_for(server.communicate(), 10)
    assert (server.returncode, out, err) == (0, b"", b"")


async def test_hang_up_ends_nothing() -> None:
    async with process(0, "works") as server:
        assert server.stdout is not None
        ready = (await asyncio.wait_for(server.stdout.readline(), 10)).decode()
        server.send_signal(signal.SIGHUP)
        async with aio.insecure_channel(ready.split()[1].removeprefix("grpc=")) as channel:
            served = Served(None, FakeEngine(), channel)  # type: ignore[arg-type]
            assert await health_of(served) == SERVING
        server.send_signal(signal.SIGTERM)
        await asyncio.wait_for(server.communicate(), 10)
    assert server.returncode == 0


async def test_signal_while_loading_stops_at_once() -> None:
    async with process(60, "works") as server:
        await asyncio.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        out, err = await asyncio.wait_for(server.communicate(), 10)
    assert (server.returncode, out, err) == (0, b"", b"")


async def test_signal_while_adapters_load_stops_at_once() -> None:
    async with process(0, "starts") as server:
        assert server.stdout is not None
        assert await server.stdout.readline() == b"starting\n"
        await asyncio.sleep(0.1)
        server.send_signal(signal.SIGTERM)
        out, err = await asyncio.wait_for(server.communicate(), 10)
    assert (server.returncode, out, err) == (0, b"", b"")


async def test_second_signal_cuts_the_drain_short() -> None:
    async with process(0, "hangs") as server:
        assert server.stdout is not None
        await server.stdout.readline()
        server.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.3)
        assert server.returncode is None
        server.send_signal(signal.SIGTERM)
        await asyncio.wait_for(server.communicate(), 10)
    assert server.returncode == 0


async def test_dead_engine_ends_the_process_with_failure() -> None:
    async with process(0, "fails") as server:
        _, err = await asyncio.wait_for(server.communicate(), 10)
    assert server.returncode == 1
    assert b"the engine has failed" in err
