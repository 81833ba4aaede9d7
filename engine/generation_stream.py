"""One client's events on the event loop: bounded by the response itself, whatever the client's speed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import replace

from fusionserve.errors import FusionServeError
from fusionserve.generation import GenerationChunk, GenerationEvent, GenerationFinished


class GenerationStream:
    """Takes events from the engine and gives them to one reader; chunks that the reader was too slow for are joined.

    So are those with less than `interval` tokens, except a candidate's first one and whatever comes before the end.
    With None there are no chunks: the reader wants the result, and is woken for nothing else.
    """

    def __init__(self, interval: int | None = 1) -> None:
        self._interval = interval
        self._begun: set[int] = set()  # candidates that had a chunk
        self._pending: deque[GenerationEvent | FusionServeError] = deque()
        self._arrived = asyncio.Event()

    def push(self, event: GenerationEvent | FusionServeError) -> None:
        """Adds an event. Never blocks."""
        if not isinstance(event, GenerationChunk):
            self._pending.append(event)
            self._arrived.set()
        elif self._interval is not None:
            chunk = self._join_pending(event)
            self._pending.append(chunk)
            if self._is_due(chunk, self._interval):
                self._arrived.set()

    async def events(self) -> AsyncIterator[GenerationEvent]:
        """Yields events up to the finished one; raises the error that ended the request instead, if there is one."""
        while True:
            await self._arrived.wait()
            event = self._pending.popleft()
            if not self._pending:
                self._arrived.clear()
            if isinstance(event, FusionServeError):
                raise event
            yield event
            if isinstance(event, GenerationFinished):
                return

    def _is_due(self, chunk: GenerationChunk, interval: int) -> bool:
        is_first = chunk.candidate_index not in self._begun
        self._begun.add(chunk.candidate_index)
        return is_first or len(chunk.token_ids) >= interval

    def _join_pending(self, chunk: GenerationChunk) -> GenerationChunk:
        """Takes an unread chunk of the same candidate out of the queue and puts `chunk` behind it."""
        for earlier in self._pending:
            if isinstance(earlier, GenerationChunk) and earlier.candidate_index == chunk.candidate_index:
                self._pending.remove(earlier)
                return replace(
                    chunk,
                    text=earlier.text + chunk.text,
                    token_ids=earlier.token_ids + chunk.token_ids,
                    logprobs=earlier.logprobs + chunk.logprobs,
                    fusion_weights=earlier.fusion_weights + chunk.fusion_weights,
                )
        return chunk
