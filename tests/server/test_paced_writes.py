"""A client that leaves no room for messages: its place goes to others, and it is told once it reads on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import pytest
from grpc import aio
from server_fixture import Served, channel_without_room, serving_server, to_failure

from fusionserve.v1 import inference_pb2 as pb
from fusionserve.v1.inference_pb2_grpc import InferenceServiceStub

TIMEOUT_S = 0.4
MANY = pb.StreamGenerateRequest(
    request=pb.GenerateRequest(text="a", stopping=pb.StoppingCriteria(max_new_tokens=50))
)


def stream_without_room(
    served: Served, channel: aio.Channel
) -> aio.UnaryStreamCall[pb.StreamGenerateRequest, pb.StreamGenerateResponse]:
    return InferenceServiceStub(channel).StreamGenerate(MANY)


async def test_place_is_free_while_the_message_waits_and_the_client_is_told_later() -> None:
    async with serving_server(write_timeout_s=TIMEOUT_S) as served, channel_without_room(served) as channel:
        call = stream_without_room(served, channel)
        await until(lambda: served.engine.num_open == 1)
        await until(lambda: served.engine.num_open == 0)
        assert served.engine.num_closed == 1
        assert not call.done()
        with pytest.raises(aio.AioRpcError) as caught:
            await read_all(call)
        failure = to_failure(caught.value)
        assert (failure.code, failure.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "NOT_READ")


async def test_client_that_reads_in_time_gets_everything() -> None:
    async with serving_server(write_timeout_s=TIMEOUT_S) as served, channel_without_room(served) as channel:
        call = stream_without_room(served, channel)
        messages = []
        async for message in call:
            messages.append(message)
            if len(messages) < 8:
                await asyncio.sleep(TIMEOUT_S / 4)
        assert messages[-1].HasField("finished")
        assert len(messages) == 52


@pytest.mark.parametrize("wait_s", [0.1, 2 * TIMEOUT_S], ids=["before its time is over", "after it"])
async def test_client_that_goes_while_a_message_waits_leaves_nothing(
    wait_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving_server(write_timeout_s=TIMEOUT_S) as served, channel_without_room(served) as channel:
        call = stream_without_room(served, channel)
        await until(lambda: served.engine.num_open == 1)
        await asyncio.sleep(wait_s)
        call.cancel()
        await until(lambda: served.engine.num_open == 0)
        assert served.engine.num_closed == 1
    assert caplog.text == ""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.005)


async def read_all(call: aio.UnaryStreamCall[pb.StreamGenerateRequest, pb.StreamGenerateResponse]) -> None:
    async for _ in call:
        pass
