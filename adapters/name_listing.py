"""The names on disk, for any number of askers at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fusionserve.adapters.disk_slots import DiskSlots


class NameListing:
    """One look at the disk at a time, and one that waits for its turn, which all who come meanwhile share.

    Nobody is told less than what was there as he asked. `read` is called on a worker thread.
    """

    def __init__(self, read: Callable[[], set[str]], timeout_s: float) -> None:
        self._read = read
        self._slot = DiskSlots(1, timeout_s)
        self._next: asyncio.Task[set[str]] | None = None  # waits for its turn

    async def names(self) -> set[str]:
        """What `read` returns. Raises what it raises, and TimeoutError."""
        if self._next is None:
            self._next = asyncio.create_task(self._look())
            self._next.add_done_callback(_see_exception)
        return await asyncio.shield(self._next)  # one asker's cancellation is not the others'

    async def _look(self) -> set[str]:
        try:
            return await self._slot.run(self._begin, lambda _: None)
        finally:
            if self._next is asyncio.current_task():  # its turn did not come in time
                self._next = None

    async def _begin(self) -> set[str]:
        self._next = None  # who comes from here on may look for what is written meanwhile
        return await asyncio.to_thread(self._read)


def _see_exception(task: asyncio.Task[set[str]]) -> None:
    """Keeps asyncio from reporting a failed look as unseen when every asker has gone."""
    if not task.cancelled():
        task.exception()
