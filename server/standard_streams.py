"""Standard input, output and error, whatever the parent process made of them."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


def prepare_streams() -> None:
    """Has all three: a closed one is empty or forgets, and what output's encoding lacks is escaped."""
    # In the order of their descriptors, so that each gets its own, and no other file does.
    sys.stdin = sys.stdin or _nothing("r")
    sys.stdout = sys.stdout or _nothing("w")
    sys.stderr = sys.stderr or _nothing("w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Forgets what is yet to be written: a reader that has gone is otherwise complained of once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _nothing(mode: str) -> Any:
    return os.fdopen(os.open(os.devnull, os.O_RDWR), mode)
