"""Far more requests at once than a server takes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from fusionserve.client import AsyncClient, Client, ClientError, GenerateOptions
from fusionserve.loadtest.hostile.target import LONG, PROMPT, Target

REQUESTS = 10_000
_SHORT: GenerateOptions = {**LONG, "max_new_tokens": 8}
_HEALTH_EVERY_S = 0.1


@dataclass(slots=True)
class Crowd:
    """What became of the requests, and how long health checks took meanwhile.

    The checks are asked from a thread of their own: the loop that the crowd keeps busy is not the server's.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    refused_s: list[float] = field(default_factory=list)  # from the first request's sending to each refusal
    healthy_s: list[float] = field(default_factory=list)


async def come_all_at_once(target: Target, num_requests: int = REQUESTS) -> Crowd:
    """Sends all of them and waits for every answer."""
    crowd = Crowd()
    answered = threading.Event()
    async with AsyncClient(target.grpc) as client:
        watching = asyncio.create_task(asyncio.to_thread(_watch_health, target, crowd, answered))
        started_s = time.monotonic()
        try:
            await asyncio.gather(*(_ask(client, crowd, started_s) for _ in range(num_requests)))
        finally:
            answered.set()
            await watching
    return crowd


async def crowd_in(target: Target) -> None:
    """A crowd of a size that can come again and again."""
    await come_all_at_once(target, REQUESTS // 10)


async def _ask(client: AsyncClient, crowd: Crowd, started_s: float) -> None:
    try:
        await client.generate(PROMPT, timeout_s=120, **_SHORT)
        crowd.statuses["OK"] += 1
    except ClientError as error:
        crowd.statuses[error.status] += 1
        crowd.refused_s.append(time.monotonic() - started_s)


def _watch_health(target: Target, crowd: Crowd, answered: threading.Event) -> None:
    with Client(target.grpc) as client:
        while not answered.is_set():
            started_s = time.monotonic()
            client.wait_ready(30)
            crowd.healthy_s.append(time.monotonic() - started_s)
            answered.wait(_HEALTH_EVERY_S)
