"""Calls of methods that the server does not have, whatever their names are made of."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from grpc import aio
from server_fixture import Served, serving_server, to_failure

from fusionserve.loadtest.hostile.raw import NO_TEXT, call_what_is_no_text
from fusionserve.loadtest.hostile.target import Target
from fusionserve.server import known_methods
from fusionserve.v1 import inference_pb2 as pb


def target_of(served: Served) -> Target:
    return Target(grpc=str(served.app.grpc_address), metrics=str(served.app.metrics_address))


@pytest.mark.parametrize(
    "method", ["/other.Service/Other", "/fusionserve.v1.InferenceService/Other", "/", "/ä"]
)
async def test_other_methods_are_refused_with_a_reason(served: Served, method: str) -> None:
    with pytest.raises(aio.AioRpcError) as refused:
        await served.channel.unary_unary(method)(b"")
    failure = to_failure(refused.value)
    assert (failure.code.name, failure.reason) == ("UNIMPLEMENTED", "METHOD_NOT_FOUND")


async def test_name_that_is_no_text_is_refused_alike(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.engine.gate = asyncio.Event()
    request = pb.StreamGenerateRequest(request=pb.GenerateRequest(text="a"))
    stream = served.inference.StreamGenerate(request)
    await stream.read()
    answers = await call_what_is_no_text(target_of(served))
    assert len(answers) == len(NO_TEXT)
    assert all(b"grpc-status\x0212" in answer for answer in answers)
    served.engine.gate.set()
    events = [await stream.read() for _ in range(5)]
    assert events[-1].HasField("finished")
    async with aio.insecure_channel(str(served.app.grpc_address)) as channel:
        with pytest.raises(aio.AioRpcError) as refused:
            await channel.unary_unary("/other.Service/Other")(b"")
    assert to_failure(refused.value).reason == "METHOD_NOT_FOUND"
    assert caplog.text == ""


def test_this_release_of_grpc_is_known() -> None:
    release = tuple(int(part) for part in grpc.__version__.split(".")[:2])
    assert release < known_methods._BEFORE, (
        "does its accept loop still decode names, and do the classes still fit?"
    )


async def test_listener_that_ends_by_itself_stops_the_server_when_streams_have_ended(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(known_methods, "_BEFORE", (1, 84))  # as with a release that nobody has looked at
    async with serving_server() as served:
        served.engine.gate = asyncio.Event()
        request = pb.StreamGenerateRequest(request=pb.GenerateRequest(text="a"))
        stream = served.inference.StreamGenerate(request)
        await stream.read()
        failed = asyncio.create_task(served.app.wait_failed())
        with pytest.raises(OSError):
            await call_what_is_no_text(target_of(served))
        await asyncio.sleep(1.5)
        assert not failed.done()
        served.engine.gate.set()
        events = [await stream.read() for _ in range(5)]
        assert events[-1].HasField("finished")
        await asyncio.wait_for(failed, 5)
        assert "no more calls are accepted" in caplog.text
