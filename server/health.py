"""grpc.health.v1 for the server and its services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable

from grpc import aio
from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from fusionserve.errors import NotFoundError, UnavailableError

_Response = pb.HealthCheckResponse
_Context = aio.ServicerContext[pb.HealthCheckRequest, pb.HealthCheckResponse]


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """One status for "" and every service, NOT_SERVING until `serve` and for good after `drain`.

    Not the stock servicer: there, one watcher's end silences the other watchers of its service, and open
    watches hold up the server's end.
    """

    def __init__(self, services: Iterable[str]) -> None:
        self._services = frozenset(("", *services))
        self._status = _Response.NOT_SERVING
        self._is_draining = False
        self._is_closed = False
        self._changed = asyncio.Event()

    def serve(self) -> None:
        """Tells that requests are served, unless the server is draining."""
        if not self._is_draining:
            self._set(_Response.SERVING)

    def drain(self) -> None:
        """Tells that no new requests should come, for good."""
        self._is_draining = True
        self._set(_Response.NOT_SERVING)

    def close(self) -> None:
        """Ends open watches."""
        self._is_closed = True
        self.drain()

    async def Check(self, request: pb.HealthCheckRequest, context: _Context) -> pb.HealthCheckResponse:
        """The status. Raises NotFoundError for a service the server does not have."""
        if request.service not in self._services:
            raise NotFoundError(
                "there is no such service",
                resource_type="service",
                resource_name=request.service,
                reason="SERVICE_NOT_FOUND",
            )
        return _Response(status=self._status)

    async def Watch(
        self, request: pb.HealthCheckRequest, context: _Context
    ) -> AsyncGenerator[pb.HealthCheckResponse, None]:
        """The status, and each one that follows it."""
        is_known = request.service in self._services
        sent = None
        while not self._is_closed:
            changed = self._changed  # taken before the status is read, so that no change is missed
            status = self._status if is_known else _Response.SERVICE_UNKNOWN
            if status != sent:
                yield _Response(status=status)
                sent = status
            await changed.wait()
        raise UnavailableError("the server is stopping", reason="DRAINING")

    def _set(self, status: pb.HealthCheckResponse.ServingStatus) -> None:
        self._status = status
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
