"""A client in a process of its own, that can be killed or frozen in the middle of its streams."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from fusionserve.loadtest.hostile.target import Target

FROZEN_S = 12.0  # longer than the server takes to notice


class Child:
    """The process, once all its streams have a token; it reads as fast as it can until something is done to it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def kill(self) -> None:
        """Ends it by SIGKILL: the system closes its connection."""
        self._process.kill()

    def freeze(self) -> None:
        """Stops it by SIGSTOP: its connection stays open, and nobody answers."""
        self._process.send_signal(signal.SIGSTOP)


@asynccontextmanager
async def streaming_child(target: Target, num_streams: int = 3) -> AsyncIterator[Child]:
    """A client in the middle of its streams, killed when the block is left."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "fusionserve.loadtest.hostile.streams"),
        *(target.grpc, str(num_streams)),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"GRPC_VERBOSITY": "NONE"},
    )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), 30)
        assert line, "the client did not get its streams"
        yield Child(process)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def be_killed(target: Target) -> None:
    """A client killed in the middle of its streams."""
    async with streaming_child(target) as child:
        child.kill()


async def be_frozen(target: Target) -> None:
    """A client frozen in the middle of its streams for longer than the server waits."""
    async with streaming_child(target) as child:
        child.freeze()
        await asyncio.sleep(FROZEN_S)
