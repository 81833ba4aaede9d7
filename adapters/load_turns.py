"""Loads compute beside the engine: on a core that they borrow from it, one after the other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from fusionserve.kernels.threads import borrowed_core

_AT_MOST_S = 0.05  # storage may be slow, and then the core lies idle

_turn = threading.Lock()

P = ParamSpec("P")
T = TypeVar("T")


async def on_borrowed_core(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Awaits `function` on a worker thread, which borrows a core of the engine's to read or to fold."""

    def run() -> T:
        with _in_turn(), borrowed_core(_AT_MOST_S):
            return function(*arguments, **options)

    return await asyncio.to_thread(run)


@contextmanager
def _in_turn() -> Iterator[None]:
    """Side by side, two loads would both be done when the second one is, and take two cores from the engine.

    What is not done in that time waits for its disk, or folds, and nobody waits for that.
    """
    is_ours = _turn.acquire(timeout=_AT_MOST_S)
    try:
        yield
    finally:
        if is_ours:
            _turn.release()
