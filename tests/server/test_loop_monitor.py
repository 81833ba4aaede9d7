"""The loop's own figures: how late it was, and its tasks."""

from __future__ import annotations

import asyncio
import time

from fusionserve.metrics import REGISTRY
from fusionserve.server.loop_monitor import BEAT_S, loop_measured

LAG, TASKS = "fusionserve_event_loop_lag_seconds", "fusionserve_event_loop_tasks"
BLOCKED_S = 0.3


async def reported(name: str, at_least: float) -> float:
    """The metric's value, once it is so large."""
    for _ in range(300):
        value = REGISTRY.get_sample_value(name)
        assert value is not None
        if value >= at_least:
            return value
        await asyncio.sleep(BEAT_S)
    raise AssertionError(f"{name} stays at {value}")


async def test_loop_that_was_blocked_says_how_long() -> None:
    async with loop_measured():
        await asyncio.sleep(2 * BEAT_S)
        time.sleep(BLOCKED_S)
        assert await reported(LAG, BLOCKED_S - BEAT_S) < 3 * BLOCKED_S


async def test_tasks_are_counted_and_measuring_ends_with_the_block() -> None:
    others = [asyncio.create_task(asyncio.sleep(60)) for _ in range(7)]
    before = asyncio.all_tasks()
    async with loop_measured():
        assert await reported(TASKS, 9) == 9  # those, this test and the measuring
    assert asyncio.all_tasks() == before
    for other in others:
        other.cancel()
