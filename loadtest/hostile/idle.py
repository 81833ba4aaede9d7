"""Calls that cost their client nothing and stay open: watches of the server's health, and calls without a request."""

from __future__ import annotations

import asyncio
from collections import Counter

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1.health_pb2_grpc import HealthStub

from fusionserve.loadtest.hostile.target import Target

WATCHES = 1500  # more than any server of ours takes
SPEECHLESS = 1500
CONNECTIONS = 8
SECONDS = 2.0


async def stay_idle(target: Target) -> Counter[str]:
    """Opens them over a few connections and holds on; returns what the watches were told: OK, or why not."""
    all_told = asyncio.Barrier(CONNECTIONS)  # until then none lets go of a watch for the others to have
    async with asyncio.TaskGroup() as group:
        held = [group.create_task(_hold(target, number, all_told)) for number in range(CONNECTIONS)]
    return sum((connection.result() for connection in held), Counter())


async def _hold(target: Target, number: int, all_told: asyncio.Barrier) -> Counter[str]:
    # Channels of other options do not share a connection.
    async with aio.insecure_channel(target.grpc, options=(("hostile", number),)) as channel:
        speechless: aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(
            "/grpc.health.v1.Health/Check"
        )
        watches = [HealthStub(channel).Watch(pb.HealthCheckRequest()) for _ in range(WATCHES // CONNECTIONS)]
        told = Counter(await asyncio.gather(*map(_first_word, watches)))
        await all_told.wait()
        silent = [speechless() for _ in range(SPEECHLESS // CONNECTIONS)]  # some may wait for a stream
        await asyncio.sleep(SECONDS)
        for call in (*watches, *silent):
            call.cancel()
    return told


async def _first_word(watch: aio.UnaryStreamCall[pb.HealthCheckRequest, pb.HealthCheckResponse]) -> str:
    try:
        await watch.read()
    except grpc.RpcError as error:
        assert isinstance(error, aio.AioRpcError)
        return error.code().name
    return grpc.StatusCode.OK.name
