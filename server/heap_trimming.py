"""Gives back what the heap keeps of requests and adapters that have come and gone.

Blocks are freed between others that stay, in a heap for every thread, and glibc keeps the holes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fusionserve.heap import trim

EVERY_S = 15.0  # it takes a few milliseconds


@asynccontextmanager
async def heap_trimmed(every_s: float = EVERY_S) -> AsyncIterator[None]:
    """Trims every now and then while in its block, on a thread of its own."""
    trimming = asyncio.create_task(_trim(every_s))
    try:
        yield
    finally:
        trimming.cancel()
        with suppress(asyncio.CancelledError):
            await trimming


async def _trim(every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        await asyncio.to_thread(trim)
