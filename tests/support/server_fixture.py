"""A served fake engine and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from fake_engine import FakeEngine
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio
from grpc_health.v1 import health_pb2_grpc

from fusionserve import metrics
from fusionserve.config import ServerConfig
from fusionserve.server.app import App
from fusionserve.v1 import adapter_pb2_grpc, inference_pb2_grpc

INFERENCE = "fusionserve.v1.InferenceService"
ADAPTERS = "fusionserve.v1.AdapterService"
MAX_OPEN_REQUESTS = 8
DETAILS = {
    message.DESCRIPTOR.full_name: message
    for message in (
        error_details_pb2.BadRequest,
        error_details_pb2.ErrorInfo,
        error_details_pb2.RequestInfo,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RetryInfo,
    )
}


@dataclass(frozen=True)
class Served:
    """A running App with stubs; `engine` is what it serves once `load` was awaited."""

    app: App
    engine: FakeEngine
    channel: aio.Channel
    inference: inference_pb2_grpc.InferenceServiceStub = field(init=False)
    adapters: adapter_pb2_grpc.AdapterServiceStub = field(init=False)
    health: health_pb2_grpc.HealthStub = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inference", inference_pb2_grpc.InferenceServiceStub(self.channel))
        object.__setattr__(self, "adapters", adapter_pb2_grpc.AdapterServiceStub(self.channel))
        object.__setattr__(self, "health", health_pb2_grpc.HealthStub(self.channel))

    async def load(self) -> None:
        """Lets the server serve."""
        await self.app.load(lambda labels: self.engine)


@asynccontextmanager
async def starting_server(**config: object) -> AsyncIterator[Served]:
    """A server that answers but has not loaded its engine."""
    settings = {"listen": "127.0.0.1:0", "metrics_listen": "127.0.0.1:0", **config}
    app = App(ServerConfig(**settings), MAX_OPEN_REQUESTS)  # type: ignore[arg-type]
    await app.start()
    try:
        async with aio.insecure_channel(str(app.grpc_address)) as channel:
            yield Served(app, FakeEngine(), channel)
    finally:
        await app.close(0)


@asynccontextmanager
async def serving_server(**config: object) -> AsyncIterator[Served]:
    """A server that serves a fake engine."""
    async with starting_server(**config) as served:
        await served.load()
        yield served


def channel_without_room(served: Served) -> aio.Channel:
    """Another channel, whose streams take no message before they are read."""
    # The window of each stream is the client's to choose.
    options = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0))
    return aio.insecure_channel(str(served.app.grpc_address), options=options)


@dataclass(frozen=True)
class Failure:
    """What a client learns from a failed call."""

    code: grpc.StatusCode
    text: str
    details: dict[str, Message]
    trailers: dict[str, str | bytes]

    @property
    def reason(self) -> str:
        """ErrorInfo.reason; asserts that there is one, with our domain."""
        info = self.details["ErrorInfo"]
        assert isinstance(info, error_details_pb2.ErrorInfo)
        assert info.domain == "fusionserve"
        return info.reason

    @property
    def field(self) -> str:
        """The one violated field."""
        bad = self.details["BadRequest"]
        assert isinstance(bad, error_details_pb2.BadRequest)
        (violation,) = bad.field_violations
        return violation.field


def to_failure(error: aio.AioRpcError) -> Failure:
    """The error with its details unpacked; each type may come once."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers.get("grpc-status-details-bin", b""))
    details: dict[str, Message] = {}
    for packed in status.details:
        message = DETAILS[packed.TypeName()]()
        assert packed.Unpack(message)
        assert details.setdefault(message.DESCRIPTOR.name, message) is message, "a detail came twice"
    if status.details:
        assert status.code == error.code().value[0]
    return Failure(error.code(), error.details() or "", details, trailers)


async def failure_of(call: object) -> Failure | None:
    """What a call fails with, None if it works."""
    try:
        if hasattr(call, "read"):
            while await call.read() is not aio.EOF:  # type: ignore[attr-defined]
                pass
        else:
            await call  # type: ignore[misc]
    except aio.AioRpcError as error:
        return to_failure(error)
    return None


def requests_total(kind: str, finish_reason: str, status: str) -> float:
    """The value of fusionserve_requests_total."""
    labels = {"kind": kind, "finish_reason": finish_reason, "status": status}
    return metrics.REGISTRY.get_sample_value("fusionserve_requests_total", labels) or 0.0


def handled_total(service: str, method: str, code: str, call_type: str = "unary") -> float:
    """The value of grpc_server_handled_total."""
    labels = {"grpc_type": call_type, "grpc_service": service, "grpc_method": method, "grpc_code": code}
    return metrics.REGISTRY.get_sample_value("grpc_server_handled_total", labels) or 0.0
