"""Copies to a GPU beside what it computes, on a stream of their own that the host never waits for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from fusionserve.adapters.resident import Resident


class Copies(Protocol):
    """Copies that are done some time after they were begun, in the order in which they were."""

    def begin(self, uid: int, write: Callable[[], None]) -> None:
        """Has `write` carried out behind all that the device was given before."""

    def is_done(self, uid: int) -> bool:
        """True if the last copy begun for `uid` is done. Never waits."""

    def join(self) -> None:
        """Has all that the device is given from here on wait for the copies begun."""


class CopyError(Exception):
    """`resident` could not be copied to the pool, for the reason in `__cause__`; nobody may read its rows there."""

    def __init__(self, resident: Resident) -> None:
        super().__init__(f"{resident.name} could not be copied to the pool")
        self.resident = resident


class SideStream:
    """Copies on a CUDA stream of their own. It and the current one wait for each other on the device only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._events: dict[int, torch.cuda.Event] = {}  # behind the copies that were not done when last asked

    def begin(self, uid: int, write: Callable[[], None]) -> None:
        """Launches `write`'s copies, after what was computed so far: it may read the rows that they overwrite."""
        self._events = {other: event for other, event in self._events.items() if not _is_over(event)}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            write()
        self._events[uid] = self._stream.record_event()

    def is_done(self, uid: int) -> bool:
        """Asks the event behind the copy."""
        return uid not in self._events or _is_over(self._events[uid])

    def join(self) -> None:
        """Has the current stream wait for this one."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
