"""Frees what grpc.aio allocates for a batch of operations, however the batch ends.

By itself it does so only when the task that awaits a batch takes its result: not if the batch fails, nor if the task is
cancelled first, as it is when a client resets its call (https://github.com/grpc/grpc/issues/43360). Each such call
leaves some 90 bytes for ever, scattered so that little of the heap around them can be given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from importlib import import_module
from typing import Any

import grpc

cygrpc: Any = import_module("grpc._cython.cygrpc")  # which has no types

# Releases of which it is known that what follows fits; those after may be mended, or differ.
_FROM, _BEFORE = (1, 82), (1, 87)

_execute_batch: Callable[..., Coroutine[Any, Any, None]] = cygrpc.execute_batch


def mend_batches() -> None:
    """Has grpc.aio, in all of this process, execute batches that free what they hold."""
    if _FROM <= tuple(int(part) for part in grpc.__version__.split(".")[:2]) < _BEFORE:
        cygrpc.execute_batch = _execute


def _execute(call: Any, operations: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
    """Like cygrpc.execute_batch, which is always awaited at once."""
    return _Batch(call, operations, loop).waiter


class _Batch:
    """A running batch; it goes on to its end, where it frees what it holds, also when nobody waits any more.

    `cygrpc.execute_batch` asks the event loop for a future, awaits it, and frees what the operations hold. The batch
    gives itself for both, so that it knows of the end first, and never as a failure.
    """

    __slots__ = ("_coroutine", "_loop", "waiter")

    def __init__(self, call: Any, operations: tuple[Any, ...], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.waiter: asyncio.Future[None] = loop.create_future()
        self._coroutine: Coroutine[Any, Any, None] | None = _execute_batch(call, operations, self)
        self._coroutine.send(None)  # until it awaits

    def create_future(self) -> _Batch:
        """Of the event loop."""
        return self

    def call_soon_threadsafe(self, callback: Callable[..., None], *arguments: Any) -> None:
        """Of the event loop: grpc.aio comes here with the end of the batch, from the loop's own thread or not."""
        if asyncio._get_running_loop() is self._loop:
            callback(*arguments)
        else:
            self._loop.call_soon_threadsafe(callback, *arguments)

    def __await__(self) -> Iterator[None]:
        """Of the future."""
        yield

    def cancelled(self) -> bool:
        """Of the future: False, for a batch cannot be."""
        return False

    def set_result(self, result: None) -> None:
        """Of the future: the batch has been done."""
        self._end(None)

    def set_exception(self, error: Exception) -> None:
        """Of the future: the batch has failed."""
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        """Frees what the batch holds and tells who waits, if anybody still does."""
        coroutine, self._coroutine = self._coroutine, None  # each holds the other
        assert coroutine is not None, "a batch ends once"
        try:
            coroutine.send(None)
        except StopIteration:
            pass
        except Exception as unexpected:
            error = error or unexpected
        if self.waiter.done():
            return
        if error is None:
            self.waiter.set_result(None)
        else:
            self.waiter.set_exception(error)
