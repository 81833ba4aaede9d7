"""Connections that speak no gRPC, or what no library would: other protocols, noise, silence, names that are no text."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Sequence
from contextlib import suppress

from fusionserve.loadtest.hostile.target import Target

CONNECTIONS = 40
SILENT_S = 3.0
_ANSWER_S = 2.0

# Of HTTP/2's frames.
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4

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

NO_TEXT = (b"/\xff", b"/fusionserve.v1.InferenceService/\xc3\x28", b"\xed\xa0\x80")  # none of them is UTF-8


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


async def call_what_is_no_text(target: Target) -> list[bytes]:
    """Calls of methods whose names are no text, in quick succession; returns what the server answers to each."""
    return [await call_raw(target, path) for path in NO_TEXT]


async def call_raw(target: Target, path: bytes, metadata: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """Calls with what no library would send, names and values under 128 bytes; returns what comes, up to the status."""
    reader, writer = await asyncio.open_connection(*target.grpc_endpoint)
    answer = b""
    with suppress(OSError, TimeoutError):
        writer.write(_PREFACE + _frame(_SETTINGS) + _call(path, metadata))
        async with asyncio.timeout(_ANSWER_S):
            while b"grpc-status" not in answer and (data := await reader.read(4096)):
                answer += data
    writer.close()
    return answer


async def say_nothing(target: Target) -> None:
    """Connections that say nothing at all, or a byte a second, on both ports."""
    endpoints = (target.grpc_endpoint, target.metrics_endpoint)
    await asyncio.gather(*(_dawdle(endpoints[n % 2], n % 4 > 1) for n in range(CONNECTIONS)))


def _call(path: bytes, metadata: Sequence[tuple[bytes, bytes]]) -> bytes:
    """A call of it with an empty message, as the first of its connection."""
    headers = (
        *((b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"server")),
        *((b"te", b"trailers"), (b"content-type", b"application/grpc")),
        *metadata,
    )
    # Each header stands as it is, behind the lengths of its name and value; no compression.
    block = b"".join(b"\x00%c%b%c%b" % (len(name), name, len(value), value) for name, value in headers)
    return _frame(_HEADERS, _END_HEADERS, 1, block) + _frame(_DATA, _END_STREAM, 1, bytes(5))


def _frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


async def _dawdle(endpoint: tuple[str, int], says_bytes: bool) -> None:
    with suppress(OSError):
        _, writer = await asyncio.open_connection(*endpoint)
        for _ in range(int(SILENT_S)):
            if says_bytes:
                writer.write(b"G")
            await asyncio.sleep(1)
        writer.close()
