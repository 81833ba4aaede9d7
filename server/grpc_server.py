"""The gRPC listener with all its services."""

from __future__ import annotations

import asyncio

from grpc_channelz.v1 import channelz
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from fusionserve.config import ServerConfig
from fusionserve.errors import StartupError
from fusionserve.server.access import Access
from fusionserve.server.adapter_servicer import AdapterServicer
from fusionserve.server.engine_gate import EngineGate
from fusionserve.server.exposure import check_exposure
from fusionserve.server.grpc_batches import mend_batches
from fusionserve.server.grpc_log import keep_metadata_out
from fusionserve.server.health import HealthServicer
from fusionserve.server.inference_servicer import InferenceServicer
from fusionserve.server.interceptors import CallInterceptor, refuse_method
from fusionserve.server.known_methods import is_accepting, make_server
from fusionserve.server.listen_address import ListenAddress
from fusionserve.server.request_log import RequestLog
from fusionserve.server.tls import to_credentials
from fusionserve.v1 import adapter_pb2, adapter_pb2_grpc, inference_pb2, inference_pb2_grpc

SERVICES: tuple[str, ...] = (
    inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    adapter_pb2.DESCRIPTOR.services_by_name["AdapterService"].full_name,
)
HEALTH: str = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

PERMITTED_PING_INTERVAL_S = 5.0  # a client that pings more often, and is sent nothing meanwhile, is cut off

_OPTIONS = (
    # Two servers on one port would each get a part of the calls.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.max_pings_without_data", 0),
    # Of calls that come faster than they are looked at gRPC cancels some beyond 1,000 and all beyond 3,000, without a
    # word. With more waiting they get our refusal, which says that and when to try again.
    ("grpc.server.max_pending_requests", 16_384),
    ("grpc.server.max_pending_requests_hard_limit", 32_768),
    # Likewise of calls that wait for half a minute, as some of thousands do on a slow machine.
    ("grpc.server_max_unrequested_time_in_server", 600),
    # gRPC would count calls that have ended at their client and not yet here, and reset new ones without a word.
    ("grpc.http.overload_protection", 0),
)
# gRPC refuses with a bare status, before a body is read: up to this many times the limit it is ours that says why.
_TAKEN_TO_REFUSE = 2
_LOOK_EVERY_S = 1.0
# Calls of one connection beside its generations. Whatever is more waits at the client.
_OTHER_CALLS = 256


class GrpcServer:
    """The bound server, its health and gate; it answers once started and generates while the gate is open."""

    def __init__(self, config: ServerConfig, max_open_requests: int) -> None:
        self.gate = EngineGate()
        self.health = HealthServicer(SERVICES)
        self._access = Access(config.token_file)
        self._tls = to_credentials(config)
        interceptor = CallInterceptor(config.max_message_bytes, config.write_timeout_s, self._access)
        taken = ("grpc.max_receive_message_length", _TAKEN_TO_REFUSE * config.max_message_bytes)
        streams = ("grpc.max_concurrent_streams", _max_streams(max_open_requests))
        options = (*_OPTIONS, *_keepalive(config), taken, streams)
        mend_batches()
        keep_metadata_out()
        self._server = make_server(interceptor, options, refuse_method)
        self._add_services(config)
        address = ListenAddress.parse(config.listen)
        # gRPC reports what is wrong in several lines of its own log; the system gives the reason alone.
        address.bind().close()
        check_exposure(address, config)
        self.address = self._bind(address)

    async def start(self) -> None:
        """Starts to answer; generation is refused with STARTING."""
        await self._server.start()

    async def wait_ended(self) -> None:
        """Returns when no more calls are accepted."""
        while is_accepting(self._server):
            await asyncio.sleep(_LOOK_EVERY_S)

    async def stop(self, grace_s: float) -> None:
        """Closes the listener, and after `grace_s` what calls are left."""
        self.health.close()
        await self._server.stop(grace_s)

    def _add_services(self, config: ServerConfig) -> None:
        inference = InferenceServicer(
            self.gate,
            self._access.limits,
            max_request_s=config.max_request_s,
            shares_prefix_cache=config.share_prefix_cache,
            log=RequestLog(config.log_requests),
        )
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(inference, self._server)
        adapter_pb2_grpc.add_AdapterServiceServicer_to_server(AdapterServicer(self.gate), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        if config.enable_channelz:
            channelz.add_channelz_servicer(self._server)
        if config.enable_reflection:
            names = (*SERVICES, HEALTH, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    def _bind(self, address: ListenAddress) -> ListenAddress:
        try:
            if self._tls is not None:
                return ListenAddress(address.host, self._server.add_secure_port(str(address), self._tls))
            return ListenAddress(address.host, self._server.add_insecure_port(str(address)))
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address}", reason="LISTEN_FAILED") from error


def _max_streams(max_open_requests: int) -> int:
    """One connection can carry all that the engine takes, and as much again to be told that it is too much."""
    return min(2 * max_open_requests + _OTHER_CALLS, 2**31 - 1)


def _keepalive(config: ServerConfig) -> tuple[tuple[str, int], ...]:
    """Pings both ways. A client whose machine froze has its calls ended; without the ping's timeout, a minute later."""
    timeout_ms = round(config.keepalive_timeout_s * 1000)
    return (
        ("grpc.keepalive_time_ms", round(config.keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        # Clients may ping idle connections, too.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", round(PERMITTED_PING_INTERVAL_S * 1000)),
    )
