"""What files on disk say, read again when they change; a version that cannot be used leaves the last one in force."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from fusionserve.errors import StartupError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_EVERY_S = 1.0
_Stamp = tuple[tuple[int, int, int, int] | None, ...]


class WatchedFiles(Generic[T]):
    """`read()` of `paths`, looked after at most once a second, when somebody asks. Thread-safe.

    `read` raises StartupError for what cannot be used: when made that is passed on, later it is logged, once for each
    version, and tried again at every look, for what is wrong may be the disk or a want of descriptors.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = tuple(paths)
        self._read = read
        self._lock = threading.Lock()
        self._stamp = self._look()  # of what is in force
        self._refused: _Stamp | None = None  # the last one that could not be used
        self._looked_s = time.monotonic()
        self._value = read()

    def current(self) -> T:
        """What the files say, or said when they could last be used."""
        with self._lock:
            if time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
                self._refresh()
            return self._value

    def _refresh(self) -> None:
        stamp = self._look()
        self._looked_s = time.monotonic()
        if stamp == self._stamp:
            return
        names = ", ".join(path.name for path in self._paths)
        try:
            self._value = self._read()
        except StartupError as error:
            if stamp != self._refused:
                logger.warning(
                    "%s changed and cannot be used; what was in force stays: %s", names, error.message
                )
            self._refused = stamp
        else:
            self._stamp, self._refused = stamp, None
            logger.info("%s changed and is in force", names)

    def _look(self) -> _Stamp:
        """What tells one version of the files from another: inode, size, and times of modification and change."""
        return tuple(map(_stamp, self._paths))


def _stamp(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
