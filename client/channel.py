"""How the client's channels are set up, and the readiness check that both clients share."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from fusionserve.client.server_access import ServerAccess

ChannelT = TypeVar("ChannelT")

DEFAULT_TARGET = "127.0.0.1:50051"
MAX_MESSAGE_BYTES = 64 << 20  # log-probabilities of a long prompt exceed grpc's default of 4 MiB
# A server of default size has gRPC refuse more, with the status of overload and no word on retrying.
MAX_RETRIED_BYTES = 8 << 20
POLL_INTERVAL_S = 0.1
# A call that was silent for so long has its server pinged, which permits a ping in 5 s, and ends with UNAVAILABLE if
# the answer takes longer. Else nothing would tell of a machine that lost its power.
KEEPALIVE_TIME_S = 20.0
KEEPALIVE_TIMEOUT_S = 10.0

# grpc.health.v1 in bytes: an empty request asks for the whole server, and SERVING is the number 1 in field 1.
# The stock stubs are a package that nothing else here needs.
HEALTH_CHECK = "/grpc.health.v1.Health/Check"
HEALTH_REQUEST = b""
HEALTH_SERVING = b"\x08\x01"


def connect(
    insecure: Callable[[str, list[tuple[str, Any]]], ChannelT],
    secure: Callable[[str, grpc.ChannelCredentials, list[tuple[str, Any]]], ChannelT],
    target: str,
    access: ServerAccess,
    max_attempts: int,
) -> ChannelT:
    """A channel made by grpc's or grpc.aio's functions, with TLS if there are credentials.

    Raises ValueError if the token would go to another machine in the clear.

    It tries a generation at most `max_attempts` times if it is refused for load, one of more than MAX_RETRIED_BYTES
    once. The retries are grpc's own, at most 5: a call is retried only while nothing of its answer was seen, and the
    server's `grpc-retry-pushback-ms` decides when, or that it must not be.
    """
    if access.exposes_token(target):
        raise ValueError(
            f"a token would go to {target} in the clear: give credentials, or allow_insecure=True"
        )
    options = _options(max_attempts)
    if access.credentials is None:
        return insecure(target, options)
    return secure(target, access.credentials, options)


def _options(max_attempts: int) -> list[tuple[str, Any]]:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.initial_reconnect_backoff_ms", 100),  # a server that is starting is found soon
        ("grpc.max_reconnect_backoff_ms", 5000),
        *_keepalive(),
    ]
    if max_attempts > 1:
        options += [
            ("grpc.service_config", json.dumps(_service_config(max_attempts))),
            # Of requests over 256 KiB it would else make one try.
            ("grpc.per_rpc_retry_buffer_size", MAX_RETRIED_BYTES),
        ]
    return options


def _keepalive() -> tuple[tuple[str, int], ...]:
    timeout_ms = round(KEEPALIVE_TIMEOUT_S * 1000)
    return (
        ("grpc.keepalive_time_ms", round(KEEPALIVE_TIME_S * 1000)),
        ("grpc.keepalive_timeout_ms", timeout_ms),
        ("grpc.http2.ping_timeout_ms", timeout_ms),
        # A client that waits sends nothing else, and would soon ping no more than once a minute.
        ("grpc.http2.max_pings_without_data", 0),
    )


def _service_config(max_attempts: int) -> dict[str, Any]:
    policy = {
        "maxAttempts": max_attempts,
        "initialBackoff": "0.1s",
        "maxBackoff": "5s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
    }
    # A lost answer does not say whether a load or unload happened, so those are never repeated.
    return {
        "methodConfig": [{"name": [{"service": "fusionserve.v1.InferenceService"}], "retryPolicy": policy}]
    }
