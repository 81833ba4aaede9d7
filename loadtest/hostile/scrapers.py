"""Scrapers that want the metrics far more often than they change."""

from __future__ import annotations

import asyncio
import time

from fusionserve.loadtest.hostile.target import Target

PER_S = 100
SECONDS = 3.0
_REQUEST = b"GET /metrics HTTP/1.0\r\n\r\n"


async def flood_with_scrapes(target: Target) -> list[float]:
    """Scrapes PER_S times a second; returns how long each took."""
    async with asyncio.TaskGroup() as group:
        scrapes = []
        for _ in range(int(SECONDS * PER_S)):
            scrapes.append(group.create_task(_scrape(target.metrics_endpoint)))
            await asyncio.sleep(1 / PER_S)
    return [scrape.result() for scrape in scrapes]


async def _scrape(endpoint: tuple[str, int]) -> float:
    started_s = time.monotonic()
    reader, writer = await asyncio.open_connection(*endpoint)
    writer.write(_REQUEST)
    await reader.read()
    writer.close()
    return time.monotonic() - started_s
