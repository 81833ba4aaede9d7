"""Stop signals from the first moment on, before an event loop can take them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_at_once() -> Iterator[None]:
    """In its block SIGTERM and SIGINT end the process with success, and SIGHUP does nothing.

    Unless `StopSignals` takes them over.
    """
    before = {number: signal.signal(number, _stop) for number in SIGNALS}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    # Nothing is open yet, and an exception in the middle of an import could be caught there.
    os._exit(0)
