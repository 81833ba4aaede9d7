"""Work on a disk that may hang."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class DiskSlots:
    """A few pieces of work at a time, none of which anybody waits for longer than `timeout_s`.

    A read cannot be called off: what hangs keeps its slot, whoever gave up on it, so that a dead disk takes no more
    threads than there are slots.
    """

    def __init__(self, num_slots: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._free = asyncio.Semaphore(num_slots)

    async def run(self, work: Callable[[], Coroutine[Any, Any, T]], on_late: Callable[[T], None]) -> T:
        """What `work` returns; what it returns too late is given to `on_late`.

        Raises what it raises, and TimeoutError; the time to wait for a slot counts.
        """
        end_s = time.monotonic() + self.timeout_s
        await asyncio.wait_for(self._free.acquire(), self.timeout_s)
        working = asyncio.create_task(work())
        working.add_done_callback(lambda _: self._free.release())
        try:
            await asyncio.wait([working], timeout=max(0.0, end_s - time.monotonic()))
        finally:  # nobody waits any longer, or the caller has gone
            if not working.done():
                working.add_done_callback(partial(_take_late, on_late))
        if not working.done():
            raise TimeoutError
        return working.result()


def _take_late(on_late: Callable[[T], None], working: asyncio.Task[T]) -> None:
    if not working.cancelled() and working.exception() is None:
        on_late(working.result())
