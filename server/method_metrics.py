"""The conventional gRPC server metrics, named as other servers name them, so that their dashboards fit."""

from __future__ import annotations

import time

import grpc
from prometheus_client import Counter, Histogram

from fusionserve.metrics import REGISTRY

_LABELS = ("grpc_type", "grpc_service", "grpc_method")
_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

STARTED = Counter("grpc_server_started_total", "RPCs started on the server.", _LABELS, registry=REGISTRY)
HANDLED = Counter(
    "grpc_server_handled_total",
    "RPCs completed on the server, by status code.",
    (*_LABELS, "grpc_code"),
    registry=REGISTRY,
)
HANDLING_SECONDS = Histogram(
    "grpc_server_handling_seconds",
    "From the start of an RPC's handler to its end.",
    _LABELS,
    buckets=_BUCKETS,
    registry=REGISTRY,
)


class MethodCall:
    """Counts one call of a method the server has; made when its handler starts."""

    def __init__(self, method: str, handler: grpc.RpcMethodHandler[object, object]) -> None:
        self.method = method
        service, _, name = method.removeprefix("/").partition("/")
        self._labels = (_call_type(handler), service, name)
        self._start_s = time.perf_counter()
        STARTED.labels(*self._labels).inc()

    def end(self, code: grpc.StatusCode) -> None:
        """Counts the call as answered with `code`."""
        HANDLED.labels(*self._labels, code.name).inc()
        HANDLING_SECONDS.labels(*self._labels).observe(time.perf_counter() - self._start_s)


def _call_type(handler: grpc.RpcMethodHandler[object, object]) -> str:
    if handler.request_streaming and handler.response_streaming:
        return "bidi_stream"
    if handler.request_streaming:
        return "client_stream"
    return "server_stream" if handler.response_streaming else "unary"
