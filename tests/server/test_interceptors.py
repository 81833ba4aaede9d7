"""What grpc.aio would get wrong by itself: unreadable requests, cancellation, and where clean-up happens."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import grpc
import pytest
from grpc import aio
from prometheus_client import generate_latest
from server_fixture import (
    ADAPTERS,
    INFERENCE,
    Served,
    channel_without_room,
    handled_total,
    requests_total,
    to_failure,
)

from fusionserve import metrics
from fusionserve.config import ServerConfig
from fusionserve.errors import PreconditionError
from fusionserve.server import interceptors
from fusionserve.v1 import inference_pb2 as pb
from fusionserve.v1.inference_pb2_grpc import InferenceServiceStub

MAX_MESSAGE_BYTES = ServerConfig().max_message_bytes
GARBAGE = [b"\xff\xff\xff", b"\x12\x05ab", b"\x12\x02\xff\xfe"]  # no tag, truncated, text that is not UTF-8


async def until(condition: object) -> None:
    """Waits until `condition()` is true."""
    assert callable(condition)
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def still(count: Callable[[], int], for_s: float = 0.2) -> None:
    """Waits until `count()` has not changed for a while."""
    seen = -1
    async with asyncio.timeout(30):
        while seen != (seen := count()):
            await asyncio.sleep(for_s)


def stream(served: Served, **kwargs: float) -> aio.UnaryStreamCall:
    request = pb.StreamGenerateRequest(request=pb.GenerateRequest(text="a"))
    return served.inference.StreamGenerate(request, **kwargs)


@pytest.mark.parametrize("data", GARBAGE)
@pytest.mark.parametrize("method", ["Generate", "Tokenize"])
async def test_unreadable_request_is_refused(served: Served, method: str, data: bytes) -> None:
    before = handled_total(INFERENCE, method, "INVALID_ARGUMENT")
    with pytest.raises(aio.AioRpcError) as caught:
        await served.channel.unary_unary(f"/{INFERENCE}/{method}")(
            data if method == "Generate" else b"\n\x01\xff"
        )
    failure = to_failure(caught.value)
    assert (failure.code.name, failure.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")
    assert "DecodeError" not in failure.text
    assert handled_total(INFERENCE, method, "INVALID_ARGUMENT") == before + 1


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05ab"])
async def test_unreadable_stream_request_is_refused(served: Served, data: bytes) -> None:
    call = served.channel.unary_stream(f"/{INFERENCE}/StreamGenerate")(data)
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert to_failure(caught.value).reason == "MALFORMED_REQUEST"


async def test_unreadable_message_of_a_client_stream_is_refused(served: Served) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = served.channel.stream_stream(method)()
    await call.write(b"\xff")
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert to_failure(caught.value).reason == "MALFORMED_REQUEST"


@pytest.mark.parametrize("method", [f"/{ADAPTERS}/LoadNothing", "/other.Service/Do"])
async def test_unknown_method_is_unimplemented(served: Served, method: str) -> None:
    with pytest.raises(aio.AioRpcError) as caught:
        await served.channel.unary_unary(method)(b"")
    failure = to_failure(caught.value)
    assert (failure.code.name, failure.reason) == ("UNIMPLEMENTED", "METHOD_NOT_FOUND")
    assert failure.trailers["x-request-id"]
    name = method.rpartition("/")[2]
    assert f'grpc_method="{name}"' not in generate_latest(metrics.REGISTRY).decode()


async def test_too_large_request_is_refused_with_the_reason(served: Served) -> None:
    before = handled_total(INFERENCE, "Generate", "RESOURCE_EXHAUSTED")
    request = pb.GenerateRequest(text="a" * MAX_MESSAGE_BYTES)  # and a few bytes around it
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(request)
    failure = to_failure(caught.value)
    assert (failure.code.name, failure.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert (
        failure.text == f"the request has {request.ByteSize()} bytes, at most {MAX_MESSAGE_BYTES} are taken"
    )
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert handled_total(INFERENCE, "Generate", "RESOURCE_EXHAUSTED") == before + 1


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_too_large_stream_request_is_refused_with_the_reason(
    served: Served, compression: grpc.Compression
) -> None:
    request = pb.StreamGenerateRequest(request=pb.GenerateRequest(text="a" * MAX_MESSAGE_BYTES))
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.StreamGenerate(request, compression=compression).read()
    assert to_failure(caught.value).reason == "MESSAGE_TOO_LARGE"


async def test_too_large_message_of_a_client_stream_is_refused(served: Served) -> None:
    method = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    call = served.channel.stream_stream(method)()
    await call.write(b"a" * (MAX_MESSAGE_BYTES + 1))
    with pytest.raises(aio.AioRpcError) as caught:
        await call.read()
    assert to_failure(caught.value).reason == "MESSAGE_TOO_LARGE"


async def test_largest_request_is_taken(served: Served) -> None:
    request = pb.TokenizeRequest(text="a" * (MAX_MESSAGE_BYTES - 5))  # tag and length are the other 5
    assert request.ByteSize() == MAX_MESSAGE_BYTES
    served.engine.error = PreconditionError("read", reason="READ")
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Tokenize(request)
    assert to_failure(caught.value).reason == "READ"


@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip])
async def test_request_far_too_large_is_never_read(served: Served, compression: grpc.Compression) -> None:
    request = pb.GenerateRequest(text="a" * (2 * MAX_MESSAGE_BYTES))
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(request, compression=compression)
    assert caught.value.code().name == "RESOURCE_EXHAUSTED"
    assert "grpc-status-details-bin" not in dict(caught.value.trailing_metadata())  # gRPC's own answer


async def test_cancellation_from_inside_is_answered(served: Served) -> None:
    served.engine.error = asyncio.CancelledError()
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(pb.GenerateRequest(text="a"), timeout=5)
    assert (to_failure(caught.value).code.name, to_failure(caught.value).reason) == (
        "UNAVAILABLE",
        "REQUEST_STOPPED",
    )


async def test_cancellation_from_inside_a_stream_is_answered(served: Served) -> None:
    served.engine.error_midway = asyncio.CancelledError()
    with pytest.raises(aio.AioRpcError) as caught:
        async for _ in stream(served, timeout=5):
            pass
    assert to_failure(caught.value).code.name == "UNAVAILABLE"


async def test_cancelled_stream_closes_the_engines_generator(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    before = requests_total("base", "none", "CANCELLED")
    call = stream(served)
    assert (await call.read()).HasField("started")
    assert served.engine.num_open == 1
    call.cancel()
    await until(lambda: served.engine.num_closed == 1)
    await until(lambda: requests_total("base", "none", "CANCELLED") == before + 1)


async def test_cancelled_unary_call_closes_the_engines_generator(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    before = handled_total(INFERENCE, "Generate", "CANCELLED")
    call = served.inference.Generate(pb.GenerateRequest(text="a"))
    await until(lambda: served.engine.num_open == 1)
    call.cancel()
    await until(lambda: served.engine.num_closed == 1)
    assert call.cancelled()
    await until(lambda: handled_total(INFERENCE, "Generate", "CANCELLED") == before + 1)


async def test_stream_whose_client_does_not_read_is_closed_when_it_ends(served: Served) -> None:
    request = pb.GenerateRequest(text="a", stopping=pb.StoppingCriteria(max_new_tokens=500))
    before = requests_total("base", "none", "CANCELLED")
    async with channel_without_room(served) as channel:
        call = InferenceServiceStub(channel).StreamGenerate(pb.StreamGenerateRequest(request=request))
        await call.read()
        await still(lambda: served.engine.num_chunks)  # the stream is parked in a write
        assert served.engine.num_closed == 0
        call.cancel()
        await until(lambda: served.engine.num_closed == 1)
        await until(lambda: requests_total("base", "none", "CANCELLED") == before + 1)


async def test_deadline_reaches_the_engine(served: Served) -> None:
    loop = asyncio.get_running_loop()
    await served.inference.Generate(pb.GenerateRequest(text="a"), timeout=30)
    deadline_s = served.engine.params[0].deadline_s
    assert deadline_s is not None
    assert 25 < deadline_s - loop.time() <= 31  # gRPC rounds a timeout up for the wire


async def test_request_without_deadline_gets_the_servers(served: Served) -> None:
    loop = asyncio.get_running_loop()
    for timeout in (None, 10_000):
        await served.inference.Generate(pb.GenerateRequest(text="a"), timeout=timeout)
        deadline_s = served.engine.params[-1].deadline_s
        assert deadline_s is not None
        assert 595 < deadline_s - loop.time() <= 600


async def test_passed_deadline_closes_the_engines_generator(served: Served) -> None:
    served.engine.gate = asyncio.Event()
    before = requests_total("base", "none", "DEADLINE_EXCEEDED")
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(pb.GenerateRequest(text="a"), timeout=0.2)
    assert caught.value.code().name == "DEADLINE_EXCEEDED"
    await until(lambda: served.engine.num_closed == 1)
    await until(lambda: requests_total("base", "none", "DEADLINE_EXCEEDED") == before + 1)


async def test_method_metrics_count_starts_and_seconds(served: Served) -> None:
    labels = {"grpc_type": "unary", "grpc_service": INFERENCE, "grpc_method": "GetModel"}

    def value(name: str) -> float:
        return metrics.REGISTRY.get_sample_value(name, labels) or 0

    names = ("grpc_server_started_total", "grpc_server_handling_seconds_count")
    before = [value(name) for name in names]
    await served.inference.GetModel(pb.GetModelRequest())
    assert [value(name) for name in names] == [count + 1 for count in before]


async def test_failed_call_holds_on_to_nothing_of_its_request(served: Served) -> None:
    """grpc.aio keeps what `abort` raises in a cycle; the frames of the request must not hang on it."""
    gc.collect()
    gc.disable()
    try:
        served.engine.error = MarkedError()
        with pytest.raises(aio.AioRpcError):
            await served.inference.Generate(pb.GenerateRequest(text="a"))
        kept = [error for error in gc.get_objects() if type(error) is MarkedError]
        assert all(error.__traceback__ is None for error in kept)
    finally:
        gc.enable()


class MarkedError(Exception):
    """One that nobody else raises."""


async def test_answer_to_a_client_that_has_gone_meanwhile_ends_the_call_quietly() -> None:
    class Gone:
        async def abort(self, *_: object) -> None:
            raise aio.InternalError("Failed execute_batch")

    with pytest.raises(asyncio.CancelledError):
        await interceptors._answer(PreconditionError("no", reason="NO"), "id", Gone())
