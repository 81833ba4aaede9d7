"""Clients in a hurry: deadlines that have all but passed, and calls given up at every point of their life."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from fusionserve.client import AsyncClient, ClientError, DeadlineExceededError, GenerateOptions, Generation
from fusionserve.loadtest.hostile.target import LONG, PROMPT, Target

CALLS = 100
RESETS_AT_ONCE = 50
RESETS_S = 2.0
_SHORT: GenerateOptions = {**LONG, "max_new_tokens": 4}


async def have_no_time(target: Target) -> int:
    """Deadlines of 0 and 1 ms; returns how many of the calls ended with DEADLINE_EXCEEDED."""
    async with AsyncClient(target.grpc) as client:
        ended = await asyncio.gather(*(_miss(client, n % 2 / 1000) for n in range(CALLS)))
        return sum(ended)


async def cancel_early(target: Target) -> None:
    """Calls given up before the first token."""
    async with AsyncClient(target.grpc) as client:
        for _ in range(CALLS):
            stream = client.stream(PROMPT, **LONG)
            await asyncio.sleep(0.001)
            await stream.close()


async def cancel_midway(target: Target) -> None:
    """Calls given up after a few tokens."""
    async with AsyncClient(target.grpc) as client:
        for number in range(CALLS // 4):
            async with client.stream(PROMPT, **LONG) as events:
                for _ in range(2 + number % 8):
                    await anext(events, None)


async def cancel_late(target: Target) -> None:
    """Calls given up once the last event is there."""
    async with AsyncClient(target.grpc) as client:
        for _ in range(CALLS // 4):
            async with client.stream(PROMPT, **_SHORT) as events:
                async for event in events:
                    if isinstance(event, Generation):
                        break


async def flood_with_resets(target: Target) -> int:
    """Opens calls and cancels them, as fast as it goes; returns how many."""
    async with AsyncClient(target.grpc) as client:
        end_s = time.monotonic() + RESETS_S
        num_calls = 0
        while time.monotonic() < end_s:
            streams = [client.stream(PROMPT, **LONG) for _ in range(RESETS_AT_ONCE)]
            await asyncio.sleep(0)  # they are sent
            for stream in streams:
                await stream.close()
            num_calls += len(streams)
            await asyncio.sleep(0)
        return num_calls


async def _miss(client: AsyncClient, timeout_s: float) -> bool:
    try:
        with suppress(DeadlineExceededError):
            await client.generate(PROMPT, timeout_s=timeout_s, **LONG)
            return False
    except ClientError:
        return False
    return True
