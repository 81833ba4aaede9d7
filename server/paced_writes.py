"""Writes the messages of a stream, and lets go of the stream's source if its client takes none for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from fusionserve.errors import DeadlineError
from fusionserve.failpoints import reach_failpoint

# grpc types it by request and response.
Context = Any


class PacedWrites:
    """A client decides how much it takes unread, even nothing, and a write waits for it.

    After `timeout_s` of that the generator is closed: no client may keep its place among the open requests so. The
    call itself waits on, for nothing can be sent past the message; once that is taken DeadlineError is raised.
    """

    def __init__(self, responses: AsyncGenerator[Any, None], context: Context, timeout_s: float) -> None:
        self._responses = responses
        self._context = context
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._writing_since_s: float | None = None
        self._closing: asyncio.Task[None] | None = None
        # A timer and no timeout: a write that is given up leaves a call that can be neither written to nor ended.
        # One for the stream, which looks again when the write at hand may have waited long enough, and none per write.
        self._timer = self._loop.call_later(timeout_s, self._look)

    async def run(self) -> None:
        """Writes all of them; the generator is closed at once however this ends."""
        try:
            async for response in self._responses:
                await self._write(response)
                if self._closing is not None:
                    raise DeadlineError(
                        f"the client took no message for {self._timeout_s:g} s", reason="NOT_READ"
                    )
        finally:
            self._timer.cancel()
            if self._closing is not None:
                await asyncio.wait([self._closing])
            await self._responses.aclose()

    async def _write(self, response: Any) -> None:
        reach_failpoint("stream.write")
        self._writing_since_s = self._loop.time()
        await self._context.write(response)
        self._writing_since_s = None

    def _look(self) -> None:
        """Lets go of the source if a write has lasted too long, or else looks again as soon as one may have."""
        waited_s = 0.0 if self._writing_since_s is None else self._loop.time() - self._writing_since_s
        if waited_s < self._timeout_s:
            self._timer = self._loop.call_later(self._timeout_s - waited_s, self._look)
        else:
            self._closing = self._loop.create_task(self._responses.aclose())
