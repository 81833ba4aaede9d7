"""Connections that do not speak gRPC: other protocols, noise, and silence, on either port."""

from __future__ import annotations

import asyncio
import random
import struct
from contextlib import suppress

from fusionserve.loadtest.hostile.target import Target

CONNECTIONS = 40
SILENT_S = 3.0
_ANSWER_S = 2.0

_TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(508)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HUGE_FRAME = struct.pack(">I", 0xFFFFFF00)[:3] + b"\x01\x04\x00\x00\x00\x01"
PROTOCOLS: dict[str, bytes] = {
    "HTTP/1": b"GET / HTTP/1.1\r\nHost: server\r\n\r\n",
    "TLS": _TLS_HELLO,
    "noise": random.Random(2).randbytes(100_000),
    "a frame too large": _PREFACE + _HUGE_FRAME + bytes(4096),
    "noise after the preface": _PREFACE + random.Random(3).randbytes(20_000),
    "nothing": b"",
}


async def speak(endpoint: tuple[str, int], data: bytes) -> bytes:
    """Sends it, closes that direction, and returns what the server answers within a moment."""
    reader, writer = await asyncio.open_connection(*endpoint)
    answer = b""
    with suppress(OSError, TimeoutError):
        writer.write(data)
        writer.write_eof()
        async with asyncio.timeout(_ANSWER_S):
            answer = await reader.read(4096)
    writer.close()
    return answer


async def speak_wrong_protocols(target: Target) -> None:
    """Every one of PROTOCOLS, on both ports."""
    for data in PROTOCOLS.values():
        for endpoint in (target.grpc_endpoint, target.metrics_endpoint):
            await speak(endpoint, data)


async def say_nothing(target: Target) -> None:
    """Connections that say nothing at all, or a byte a second, on both ports."""
    endpoints = (target.grpc_endpoint, target.metrics_endpoint)
    await asyncio.gather(*(_dawdle(endpoints[n % 2], n % 4 > 1) for n in range(CONNECTIONS)))


async def _dawdle(endpoint: tuple[str, int], says_bytes: bool) -> None:
    with suppress(OSError):
        _, writer = await asyncio.open_connection(*endpoint)
        for _ in range(int(SILENT_S)):
            if says_bytes:
                writer.write(b"G")
            await asyncio.sleep(1)
        writer.close()
