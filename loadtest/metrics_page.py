"""Reads a server's metrics."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import Mapping


async def read_metrics(address: str) -> Mapping[str, float]:
    """The samples at HOST:PORT by their name with labels, as they are written."""
    return await asyncio.to_thread(_read, address)


def _read(address: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def total(samples: Mapping[str, float], *parts: str) -> float:
    """The sum over the samples whose name with labels contains all of `parts`."""
    return sum(value for name, value in samples.items() if all(part in name for part in parts))
