"""Clients that ask for much and read little of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from grpc import aio

from fusionserve.client import AsyncClient, ClientError, GenerateOptions
from fusionserve.loadtest.hostile.target import LONG, PROMPT, Target
from fusionserve.v1 import inference_pb2 as pb
from fusionserve.v1.inference_pb2_grpc import InferenceServiceStub

SECONDS = 4.0
STREAMS = 3
_LARGE: GenerateOptions = {**LONG, "logprobs": 20}  # messages fill what the connection takes unread


async def read_slowly(target: Target) -> None:
    """Streams of which one message a second is read, left in the middle."""
    async with AsyncClient(target.grpc) as client:
        await asyncio.gather(*(_read_slowly(client) for _ in range(STREAMS)))


async def never_read(target: Target) -> None:
    """Streams of large messages that nobody reads, left in the middle."""
    async with AsyncClient(target.grpc) as client:
        streams = [client.stream(PROMPT, **_LARGE) for _ in range(STREAMS)]
        await asyncio.sleep(SECONDS)
        for stream in streams:
            await stream.close()


async def leave_no_room(target: Target) -> None:
    """Streams over a connection that takes next to nothing unread, so that every message waits for its client."""
    options = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    request = pb.GenerateRequest(text=PROMPT, stopping=pb.StoppingCriteria(max_new_tokens=200))
    async with aio.insecure_channel(target.grpc, options=options) as channel:
        stub = InferenceServiceStub(channel)
        calls = [stub.StreamGenerate(pb.StreamGenerateRequest(request=request)) for _ in range(STREAMS)]
        await asyncio.sleep(SECONDS)
        for call in calls:
            call.cancel()


async def read_all(target: Target) -> None:
    """As many streams that are read as fast as they come: what honest clients cost others."""
    async with AsyncClient(target.grpc) as client:
        await asyncio.gather(*(client.generate(PROMPT, **LONG) for _ in range(STREAMS)))


async def _read_slowly(client: AsyncClient) -> None:
    with suppress(ClientError):
        async with client.stream(PROMPT, **_LARGE) as events:
            for _ in range(int(SECONDS)):
                await anext(events, None)
                await asyncio.sleep(1)
