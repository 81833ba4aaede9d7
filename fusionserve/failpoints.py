"""Named places where a test may make the server sleep, fail or die, chosen in the environment.

`FUSIONSERVE_FAILPOINTS="artifact.open=sleep(0.5);engine.step=3*raise;host.publish=exit"`: at a named point the process
sleeps for so many seconds, raises (`raise` an exception that nobody expects, `oserror` and `memory` what a failing disk
and a full memory raise), or ends at once, as if it were killed. `N*ACTION` acts N times and then no more, `N+ACTION`
lets N passes go by first. Without the variable a point costs one look-up in an empty dictionary.

The idea is that of gofail (https://github.com/etcd-io/gofail), the points are those of `POINTS`.
"""

from __future__ import annotations

import errno
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType

VARIABLE = "FUSIONSERVE_FAILPOINTS"
EXIT_CODE = 70

POINTS = frozenset(
    {
        "artifact.open",  # an adapter's or a fusion's directory is open
        "artifact.header",  # the header of its weights is read and checked
        "host.publish",  # it is about to get its name
        "host.evict",  # others are about to go from the host to make room
        "pool.activate",  # rank rows are about to be copied
        "pool.evict",  # rank rows are about to be given to another
        "engine.step",  # a batch is scheduled, nothing of it computed
        "stream.write",  # a message is about to go to a client
    }
)

_TERM = re.compile(
    r"(?:(?P<skip>\d+)\+)?(?:(?P<times>\d+)\*)?(?P<action>[a-z]+)(?:\((?P<argument>[\d.]+)\))?"
)


class FailpointError(Exception):
    """What an armed point raises; it stands for a bug."""


class Failpoint:
    """One armed point: skips some passes, acts on the next ones, then no more."""

    def __init__(self, act: Callable[[], None], skip: int, times: int | None) -> None:
        self._act = act
        self._skip = skip
        self._times = times
        self._lock = threading.Lock()

    def reach(self) -> None:
        """Passes the point once."""
        if self._take_turn():
            self._act()

    def _take_turn(self) -> bool:
        with self._lock:
            if self._skip > 0:
                self._skip -= 1
                return False
            if self._times is None:
                return True
            self._times -= 1
            return self._times >= 0


def parse_failpoints(text: str) -> Mapping[str, Failpoint]:
    """The points that `text` arms. Raises ValueError for an unknown point or action."""
    terms = [term.partition("=") for term in text.split(";") if term.strip()]
    return MappingProxyType({name.strip(): _parse(name.strip(), value.strip()) for name, _, value in terms})


def reach_failpoint(name: str) -> None:
    """Does what `name` is armed with, mostly nothing."""
    point = _ARMED.get(name)
    if point is not None:
        point.reach()


def _parse(name: str, value: str) -> Failpoint:
    match = _TERM.fullmatch(value)
    if name not in POINTS or match is None or match["action"] not in _ACTIONS:
        raise ValueError(f"{VARIABLE}: no failpoint {name}={value}")
    argument = float(match["argument"] or 0)
    act = _ACTIONS[match["action"]]
    times = None if match["times"] is None else int(match["times"])
    return Failpoint(lambda: act(argument), int(match["skip"] or 0), times)


def _raise(error: Callable[[], BaseException]) -> Callable[[float], None]:
    def act(argument: float) -> None:
        raise error()

    return act


def _exit(argument: float) -> None:
    os._exit(EXIT_CODE)


_ACTIONS: Mapping[str, Callable[[float], None]] = MappingProxyType(
    {
        "sleep": time.sleep,
        "raise": _raise(lambda: FailpointError("a failpoint was reached")),
        "oserror": _raise(lambda: OSError(errno.EIO, "a failpoint was reached")),
        "memory": _raise(lambda: MemoryError("a failpoint was reached")),
        "exit": _exit,
    }
)
_ARMED = parse_failpoints(os.environ.get(VARIABLE, ""))
