"""The thread that owns the engine. Commands come in by one inbox; outputs leave by one call per step."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

from fusionserve.engine.engine import Engine, Output

_log = logging.getLogger(__name__)

Command = Callable[[Engine], None]

_STALLED_WAIT_S = 0.02  # between steps that had nothing to compute although requests wait
_COPYING_WAIT_S = 0.001  # the same while adapters are copied, which takes milliseconds


class EngineThread:
    """Runs `engine` until `stop`. `deliver` and `on_death` are called on this thread; they must not block."""

    def __init__(
        self, engine: Engine, deliver: Callable[[list[Output]], None], on_death: Callable[[], None]
    ) -> None:
        self._engine = engine
        self._deliver = deliver
        self._on_death = on_death
        self._inbox: SimpleQueue[Command | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._busy_since_s: float | None = None

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def post(self, command: Command) -> None:
        """Has `command` run on the engine thread before its next step. Never blocks; may be called from any thread."""
        self._inbox.put(command)

    def busy_for_s(self) -> float:
        """Seconds since the step or command at hand began; 0 while the thread waits."""
        since_s = self._busy_since_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def stop(self, timeout_s: float | None = None) -> None:
        """Ends the thread after the step at hand and waits for it, at most `timeout_s`."""
        self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            timeout_s: float | None = None
            while self._run_commands(timeout_s):
                timeout_s = self._step()
        except BaseException:
            _log.exception("the engine thread died")
            self._on_death()
        finally:
            self._busy_since_s = None

    def _step(self) -> float | None:
        """One step if there is work; returns how long to wait for commands before the next one, None for ever."""
        engine = self._engine
        if not engine.has_work:
            return None
        outputs = engine.step()
        if outputs:
            self._deliver(outputs)
        if not engine.is_stalled:
            return 0.0
        return _COPYING_WAIT_S if engine.is_copying else _STALLED_WAIT_S

    def _run_commands(self, timeout_s: float | None) -> bool:
        """Runs all commands in the inbox, waiting up to `timeout_s` for the first; False once told to stop."""
        self._busy_since_s = None
        try:
            command = self._inbox.get(block=timeout_s != 0.0, timeout=timeout_s or None)
            self._busy_since_s = time.monotonic()
            while command is not None:
                command(self._engine)
                command = self._inbox.get_nowait()
        except Empty:
            self._busy_since_s = time.monotonic()
            return True
        return False
