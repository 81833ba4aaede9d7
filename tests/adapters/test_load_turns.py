"""Loads take turns, except with one that hangs."""

import asyncio
import threading
import time
from itertools import pairwise

from fusionserve.adapters.load_turns import on_borrowed_core


async def test_loads_compute_one_after_the_other() -> None:
    spans: list[tuple[float, float]] = []

    def compute() -> None:
        started_s = time.monotonic()
        time.sleep(0.01)
        spans.append((started_s, time.monotonic()))

    await asyncio.gather(*(on_borrowed_core(compute) for _ in range(3)))
    assert all(begin >= end for (_, end), (begin, _) in pairwise(spans))


async def test_a_load_whose_disk_hangs_keeps_no_other_from_computing() -> None:
    hung, begun = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        assert hung.wait(60)

    hanging = asyncio.create_task(on_borrowed_core(hang))
    await asyncio.to_thread(begun.wait, 60)
    assert await asyncio.wait_for(on_borrowed_core(sum, (1, 2)), 30) == 3
    assert not hanging.done()
    hung.set()
    await hanging
