"""Reads from a call that outlive those who wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from fusionserve.client.errors import closed_error

MessageT = TypeVar("MessageT")


class ResumableReads(Generic[MessageT]):
    """One read after the other; one whose waiter is cancelled goes on, for the next waiter.

    grpc.aio cancels a call whose reader is cancelled, be it because one wait timed out. So the coroutine of a read is
    stepped here, and what it waits for is waited for beside it. A task for each read would cost more, and stay behind.
    """

    def __init__(self, read: Callable[[], Coroutine[Any, Any, MessageT]]) -> None:
        self._read = read
        self._pending: Coroutine[Any, Any, MessageT] | None = None
        self._awaited: asyncio.Future[Any] | None = None  # by the pending read

    async def next(self) -> MessageT:
        """What the pending read returns, or else a new one. Raises CancelledError if the call was cancelled."""
        while True:
            while self._awaited is not None and not self._awaited.done():
                await _done(self._awaited)
            try:
                self._step()
            except StopIteration as end:
                message: MessageT = end.value
                return message
            except asyncio.CancelledError:  # the call's: a waiter's comes where it waits
                raise closed_error() from None

    def _step(self) -> None:
        """Runs the read until it waits; raises what it ends with."""
        pending, self._pending, self._awaited = self._pending or self._read(), None, None
        self._awaited = pending.send(None)
        self._pending = pending


async def _done(future: asyncio.Future[Any]) -> None:
    """Returns when `future` is done, however it ends; cancelling the wait leaves it alone."""

    def wake(_: asyncio.Future[Any]) -> None:
        if not waiter.done():
            waiter.set_result(None)

    waiter = future.get_loop().create_future()
    future.add_done_callback(wake)
    try:
        await waiter
    finally:
        future.remove_done_callback(wake)
