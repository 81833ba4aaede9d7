"""All streams of a job at once, for a driver that has a coroutine for each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass

from fusionserve.loadtest.bench.protocol import Outcome


@dataclass(frozen=True, slots=True)
class EndedStream:
    """When a stream had its first token, by `time.monotonic`, and all of its tokens."""

    first_token_s: float
    token_ids: list[int]


async def run_streams(streams: Iterable[Awaitable[EndedStream]]) -> Outcome:
    """Starts all streams together and waits for the last; their tokens are in the order of `streams`."""
    started_s = time.monotonic()
    ended = await asyncio.gather(*streams)
    total_s = time.monotonic() - started_s
    prompt_s = max(stream.first_token_s for stream in ended) - started_s
    return Outcome(prompt_s, total_s, [stream.token_ids for stream in ended])
