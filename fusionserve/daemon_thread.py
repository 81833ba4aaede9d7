"""A thread that nobody waits for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


async def in_daemon_thread(name: str, function: Callable[[], Result]) -> Result:
    """Awaits `function()` in a thread that does not keep the process alive, as an executor's thread would."""
    future: Future[Result] = Future()

    def run() -> None:
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(future)


def is_thread_alive(name: str) -> bool:
    """True if a thread of that name is still at work."""
    return any(thread.name == name for thread in threading.enumerate())
