"""Loads one adapter after another while something else is measured."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field

from fusionserve.client import AlreadyExistsError, AsyncClient, ClientError
from fusionserve.loadtest.background_task import background_task

MAX_LOADS = 8  # at once


@dataclass(slots=True)
class Storm:
    """What became of the loads."""

    seconds: list[float] = field(default_factory=list)  # of each that succeeded
    num_present: int = 0  # in memory before
    num_refused: int = 0

    @property
    def num_loaded(self) -> int:
        """Loads that succeeded."""
        return len(self.seconds)

    @property
    def median_s(self) -> float:
        """The time of a load; 0 if none succeeded."""
        return statistics.median(self.seconds) if self.seconds else 0.0


async def load_pinned(target: str, names: Sequence[str]) -> None:
    """Loads adapters, or loads them anew, so that they stay. Raises ClientError if the server refuses."""
    async with AsyncClient(target) as client:
        for name in names:
            await client.adapters.reload(name, pin=True)


@contextlib.asynccontextmanager
async def storm_of_loads(
    target: str, names: Iterable[str], per_s: float, storm: Storm
) -> AsyncIterator[None]:
    """While the block runs, `per_s` adapters a second are loaded, in turn; fewer once MAX_LOADS are being loaded.

    Several storms that share an iterator go on where the one before ended, with adapters that nobody has loaded yet.
    """
    async with (
        AsyncClient(target) as client,
        asyncio.TaskGroup() as group,
        background_task(_keep_loading(client, names, per_s, storm, group)),
    ):
        yield


async def _keep_loading(
    client: AsyncClient, names: Iterable[str], per_s: float, storm: Storm, group: asyncio.TaskGroup
) -> None:
    room = asyncio.Semaphore(MAX_LOADS)
    for name in names:
        await room.acquire()
        group.create_task(_load(client, name, storm)).add_done_callback(lambda _: room.release())
        await asyncio.sleep(1 / per_s)


async def _load(client: AsyncClient, name: str, storm: Storm) -> None:
    started_s = time.monotonic()
    try:
        await client.adapters.load(name)
    except AlreadyExistsError:
        storm.num_present += 1
        return
    except ClientError:
        storm.num_refused += 1
        return
    storm.seconds.append(time.monotonic() - started_s)
