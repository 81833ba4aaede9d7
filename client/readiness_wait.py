"""The wait for a server, which both clients share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fusionserve.client.errors import CancelledError, ClientError, DeadlineExceededError, UnavailableError


class ReadinessWait:
    """How much of a wait is left, and what was last wrong with the server."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._last: ClientError | None = None

    def left_s(self) -> float:
        """Seconds; none are left at 0 or below."""
        return self._deadline_s - time.monotonic()

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keeps what a check inside the block fails with; a closed client's error leaves at once."""
        try:
            yield
        except CancelledError:
            raise
        except DeadlineExceededError as error:  # the wait's own end explains nothing
            self._last = self._last or error
        except ClientError as error:
            self._last = error
        else:
            self._last = None

    def error(self) -> UnavailableError:
        """What to raise in the end, with the last failure as text and cause."""
        last = "" if self._last is None else f": {self._last}"
        error = UnavailableError("UNAVAILABLE", f"the server is not ready after {self._timeout_s:g} s{last}")
        error.__cause__ = self._last
        return error
