"""SIGTERM and SIGINT as events; SIGHUP, which asks servers to read their files again, as a line of log."""

from __future__ import annotations

import asyncio
import logging
import signal

from fusionserve.server.early_stop import SIGNALS

logger = logging.getLogger(__name__)


class StopSignals:
    """Inside its block the first signal sets `asked`, the second `asked_again`; a third ends the process.

    SIGHUP ends nothing.
    """

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.asked_again = asyncio.Event()

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._receive)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _tell_of_files)
        return self

    def __exit__(self, *error: object) -> None:
        self._release()

    def _receive(self) -> None:
        if not self.asked.is_set():
            self.asked.set()
            return
        self.asked_again.set()
        self._release()

    def _release(self) -> None:
        for number in SIGNALS:
            asyncio.get_running_loop().remove_signal_handler(number)


def _tell_of_files() -> None:
    logger.info("SIGHUP: nothing to do, tokens and certificates are read again when their files change")
