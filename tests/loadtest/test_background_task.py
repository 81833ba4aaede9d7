"""Work beside a block."""

import asyncio

import pytest

from fusionserve.loadtest.background_task import background_task


class Work:
    """Says whether it was started and whether it was cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.is_cancelled = False

    async def run(self) -> None:
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.is_cancelled = True
            raise


async def test_work_runs_beside_the_block_and_is_cancelled_at_its_end() -> None:
    work = Work()
    async with background_task(work.run()):
        async with asyncio.timeout(5):
            await work.started.wait()
        assert not work.is_cancelled
    assert work.is_cancelled


async def test_work_is_cancelled_when_the_block_fails() -> None:
    work = Work()
    with pytest.raises(ValueError, match="the block"):
        async with background_task(work.run()):
            await work.started.wait()
            raise ValueError("the block")
    assert work.is_cancelled


async def test_an_error_of_the_work_is_raised_when_the_block_is_left() -> None:
    async def fail() -> None:
        raise ValueError("the work")

    with pytest.raises(ValueError, match="the work"):
        async with background_task(fail()):
            await asyncio.sleep(0)
