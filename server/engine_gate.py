"""Whether requests may reach the engine yet, or still."""

from __future__ import annotations

from fusionserve.errors import UnavailableError
from fusionserve.server.engine_facade import EngineFacade

# A restart takes seconds; a client that asks again sooner only meets the same answer.
RETRY_AFTER_S = 1.0


class EngineGate:
    """Hands out the engine between `open` and `shut`; it starts shut because the model is loading."""

    def __init__(self) -> None:
        self._engine: EngineFacade | None = None
        self._closed_reason = "STARTING"
        self._closed_text = "the server is starting"
        self._is_draining = False

    def open(self, engine: EngineFacade) -> None:
        """Lets every request through to `engine`."""
        self._engine = engine

    def drain(self) -> None:
        """Refuses new work; what looks at or ends running work still passes."""
        self._is_draining = True

    def fail(self) -> None:
        """Refuses everything, because the engine has died."""
        self._engine = None
        self._closed_reason, self._closed_text = "ENGINE_FAILED", "the engine has failed"

    def admit(self) -> EngineFacade:
        """The engine, for new work. Raises UnavailableError while starting, draining or failed."""
        if self._is_draining:
            raise UnavailableError("the server is draining", reason="DRAINING", retry_after_s=RETRY_AFTER_S)
        return self.engine()

    def engine(self) -> EngineFacade:
        """The engine, for anything else. Raises UnavailableError while starting or failed."""
        if self._engine is None:
            raise UnavailableError(self._closed_text, reason=self._closed_reason, retry_after_s=RETRY_AFTER_S)
        return self._engine
