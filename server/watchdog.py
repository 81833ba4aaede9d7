"""Ends the process if its event loop stands still, which nothing on the loop itself could notice."""

from __future__ import annotations

import asyncio
import faulthandler
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_BEATS_PER_TIMEOUT = 10


@asynccontextmanager
async def loop_watched(timeout_s: float) -> AsyncIterator[None]:
    """While in its block a loop that stands still for `timeout_s` ends the process with 1, after all threads' stacks.

    The timer is the interpreter's own (faulthandler): it needs neither the loop nor the interpreter's lock.
    """
    beating = asyncio.create_task(_beat(timeout_s))
    try:
        yield
    finally:
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating


async def _beat(timeout_s: float) -> None:
    try:
        while True:
            faulthandler.dump_traceback_later(timeout_s, exit=True)
            await asyncio.sleep(timeout_s / _BEATS_PER_TIMEOUT)
    finally:
        faulthandler.cancel_dump_traceback_later()
