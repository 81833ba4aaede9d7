"""`python -m fusionserve.loadtest.hostile.streams TARGET N`: keeps N streams going, says so once each has a token."""

from __future__ import annotations

import asyncio
import sys

from fusionserve.client import AsyncClient, GenerationChunk
from fusionserve.loadtest.hostile.target import LONG, PROMPT


async def main(target: str, num_streams: int) -> None:
    """Streams one generation after the other until killed."""
    begun = asyncio.Barrier(num_streams + 1)
    async with AsyncClient(target) as client, asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(_stream(client, begun))
        await begun.wait()
        print("streaming", flush=True)


async def _stream(client: AsyncClient, begun: asyncio.Barrier) -> None:
    is_first = True
    while True:
        async for event in client.stream(PROMPT, **LONG):
            if is_first and isinstance(event, GenerationChunk):
                is_first = False
                await begun.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
