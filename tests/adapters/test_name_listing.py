"""Many who ask for the names on disk cost it little, and none is told of what was there before he asked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from fusionserve.adapters.name_listing import NameListing


class Folder:
    """Its listing can be held up."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.num_looks = 0
        self.gate = threading.Event()

    def list(self) -> set[str]:
        self.num_looks += 1
        names = set(self.names)
        assert self.gate.wait(20)
        return names


@pytest.fixture
def folder() -> Iterator[Folder]:
    folder = Folder()
    yield folder
    folder.gate.set()


async def begun(folder: Folder, num_looks: int) -> None:
    async with asyncio.timeout(10):
        while folder.num_looks < num_looks:
            await asyncio.sleep(0.001)


async def test_who_come_while_one_looks_share_the_next_look(folder: Folder) -> None:
    listing = NameListing(folder.list, timeout_s=20)
    first = asyncio.create_task(listing.names())
    await begun(folder, 1)
    folder.names.add("late")
    others = [asyncio.create_task(listing.names()) for _ in range(1000)]
    await asyncio.sleep(0.01)
    others.pop().cancel()
    folder.gate.set()
    assert await first == set()
    assert all(names == {"late"} for names in await asyncio.gather(*others))
    assert folder.num_looks == 2


async def test_look_that_hangs_fails_those_who_wait_and_no_longer(folder: Folder) -> None:
    listing = NameListing(folder.list, timeout_s=0.05)
    for _ in range(3):
        asked = [asyncio.create_task(listing.names()) for _ in range(5)]
        assert [type(error) for error in await asyncio.gather(*asked, return_exceptions=True)] == [
            TimeoutError
        ] * 5
    assert folder.num_looks == 1
    folder.gate.set()
    async with asyncio.timeout(10):
        while True:
            try:
                assert await listing.names() == set()
                break
            except TimeoutError:
                pass
