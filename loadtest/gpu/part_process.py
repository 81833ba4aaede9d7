"""One part in a process of its own, which ends when its time is up."""

from __future__ import annotations

import faulthandler
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

from fusionserve.loadtest.gpu.figures import Failure, Figure, from_line

_LAST_WORDS_S = 5.0


def end_at(end_s: float) -> None:
    """Ends this process then, by `time.monotonic`, after it has printed where each of its threads is."""
    faulthandler.dump_traceback_later(max(0.1, end_s - time.monotonic()), exit=True)


class PartProcess:
    """A process that is started with `command`, calls `end_at(end_s)` once it can, and prints figures."""

    def __init__(self, part: str, command: Sequence[str], end_s: float) -> None:
        self._part = part
        self._started_s = time.monotonic()
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._killer = threading.Timer(end_s + _LAST_WORDS_S - self._started_s, self._process.kill)
        self._killer.start()

    def figures(self) -> Iterator[Figure]:
        """As they come, and a Failure if the process does not get to its end; returns when it has ended."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            # A library may have printed something while it was imported.
            yield from (from_line(line) for line in lines if line.startswith("{"))
        status = self._process.wait()
        self._killer.cancel()
        if status:
            seconds = time.monotonic() - self._started_s
            error = f"its process ended with status {status} after {seconds:.0f} s"
            yield Failure(part=self._part, case="", error=error)
