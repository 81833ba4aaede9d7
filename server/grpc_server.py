"""The gRPC listener with all its services."""

from __future__ import annotations

from grpc import aio
from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fusionserve.config import ServerConfig
from fusionserve.errors import StartupError
from fusionserve.server.adapter_servicer import AdapterServicer
from fusionserve.server.engine_gate import EngineGate
from fusionserve.server.health import HealthServicer
from fusionserve.server.inference_servicer import InferenceServicer
from fusionserve.server.interceptors import CallInterceptor
from fusionserve.server.listen_address import ListenAddress
from fusionserve.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVICES: tuple[str, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

_OPTIONS = (
    # Two servers on one port would each get a part of the calls.
    ("grpc.so_reuseport", 0),
    # A client whose machine froze is noticed within 40 s; without the ping timeout, a minute later.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may ping idle connections, but not often.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)
# gRPC refuses with a bare status, before a body is read: up to this many times the limit it is ours that says why.
_TAKEN_TO_REFUSE = 2


class GrpcServer:
    """The bound server, its health and gate; it answers once started and generates while the gate is open."""

    def __init__(self, config: ServerConfig) -> None:
        self.gate = EngineGate()
        self.health = HealthServicer(SERVICES)
        interceptor = CallInterceptor(config.max_message_bytes)
        taken = ("grpc.max_receive_message_length", _TAKEN_TO_REFUSE * config.max_message_bytes)
        self._server = aio.server(interceptors=(interceptor,), options=(*_OPTIONS, taken))
        self._add_services(config)
        self.address = self._bind(ListenAddress.parse(config.listen))

    async def start(self) -> None:
        """Starts to answer; generation is refused with STARTING."""
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Closes the listener, and after `grace_s` what calls are left."""
        self.health.close()
        await self._server.stop(grace_s)

    def _add_services(self, config: ServerConfig) -> None:
        inference = InferenceServicer(self.gate, config.max_request_s)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(self.gate), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if config.enable_channelz:
            channelz.add_channelz_servicer(self._server)
        if config.enable_reflection:
            names = (*SERVICES, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    def _bind(self, address: ListenAddress) -> ListenAddress:
        # gRPC reports a taken port in several lines of its own log; the system gives the reason alone.
        address.bind().close()
        try:
            return ListenAddress(address.host, self._server.add_insecure_port(str(address)))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address}", reason="LISTEN_FAILED") from error
