"""The heap is trimmed again and again, off the event loop, until the block is left."""

from __future__ import annotations

import asyncio
import platform
import threading

import psutil
import pytest

from fusionserve.server import heap_trimming
from fusionserve.server.heap_trimming import heap_trimmed


async def test_heap_is_trimmed_until_the_block_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(heap_trimming, "trim", lambda: threads.append(threading.current_thread()))
    async with heap_trimmed(every_s=0.005), asyncio.timeout(5):
        while len(threads) < 3:
            await asyncio.sleep(0.005)
    assert threading.main_thread() not in threads
    count = len(threads)
    await asyncio.sleep(0.03)
    assert len(threads) <= count + 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can")
def test_trimming_returns_what_was_freed_between_blocks_in_use() -> None:
    blocks = [bytearray(64 << 10) for _ in range(800)]
    del blocks[::2]
    process = psutil.Process()
    before = process.memory_info().rss
    heap_trimming.trim()
    assert before - process.memory_info().rss > 16 << 20
