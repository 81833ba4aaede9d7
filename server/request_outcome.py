"""How one generation request ended, for the metrics."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from grpc import aio

from fusionserve import metrics
from fusionserve.generation import GenerationEvent, GenerationFinished
from fusionserve.server.generate_params import kind_of
from fusionserve.server.request_log import RequestLog
from fusionserve.server.status import to_ended_code
from fusionserve.v1 import inference_pb2

NO_FINISH_REASON = "none"


class RequestOutcome:
    """Counts a request exactly once, and logs it if that is asked for, when its block is left, whatever ends it."""

    def __init__(
        self,
        request: inference_pb2.GenerateRequest,
        context: aio.ServicerContext[Any, Any],
        log: RequestLog,
    ) -> None:
        self._entry = log.entry(request)
        self._kind = kind_of(request)
        self._context = context
        self._finish_reason = NO_FINISH_REASON

    def __enter__(self) -> RequestOutcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status, finish_reason = "OK", self._finish_reason
        if error is not None:
            status, finish_reason = to_ended_code(error, self._context).name, NO_FINISH_REASON
        metrics.REQUESTS.labels(self._kind, finish_reason, status).inc()
        self._entry.write(status, finish_reason)

    def observe(self, event: GenerationEvent) -> None:
        """Remembers why the first candidate finished, if this is the last event."""
        if isinstance(event, GenerationFinished):
            self._finish_reason = event.candidates[0].finish_reason.value
            self._entry.finished = event
