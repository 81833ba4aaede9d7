"""Measures how late the event loop is, and how many tasks it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fusionserve.metrics import EVENT_LOOP_LAG_SECONDS, EVENT_LOOP_TASKS

BEAT_S = 0.02
_BEATS_PER_REPORT = 50


@asynccontextmanager
async def loop_measured() -> AsyncIterator[None]:
    """Keeps the two metrics of the running loop up to date while in its block."""
    measuring = asyncio.create_task(_measure())
    try:
        yield
    finally:
        measuring.cancel()
        with suppress(asyncio.CancelledError):
            await measuring


async def _measure() -> None:
    while True:
        lags_s = [await _lag_s() for _ in range(_BEATS_PER_REPORT)]
        EVENT_LOOP_LAG_SECONDS.set(max(lags_s))
        EVENT_LOOP_TASKS.set(len(asyncio.all_tasks()))


async def _lag_s() -> float:
    """How much longer a short sleep takes than it should: so long a client's event waits, too."""
    started_s = time.monotonic()
    await asyncio.sleep(BEAT_S)
    return max(time.monotonic() - started_s - BEAT_S, 0.0)
