"""What tests of bad input share: raw calls, a stream that must not notice, and what holds of every error."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import grpc
from bad_requests import STREAM, generation
from grpc import aio
from server_fixture import Failure, to_failure

from fusionserve.v1 import inference_pb2

LEAK = re.compile(
    r"/(?:work|tmp|home|root|usr|opt|etc)\b|\.py\b|Traceback|File \"|0x[0-9a-f]{6,}|-packages|passwd"
)
REASON = re.compile(r"[A-Z][A-Z0-9_]{1,62}")
MAX_TRAILER_BYTES = 8 << 10
BESIDE = 16  # cases beside one healthy stream
HEALTHY = ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7})

ItemT = TypeVar("ItemT")


async def send(channel: aio.Channel, method: str, request: bytes, timeout_s: float = 60) -> Failure | None:
    """The answer to a request of raw bytes; None is OK."""
    try:
        if method == STREAM:
            async for _ in channel.unary_stream(method)(request, timeout=timeout_s):
                pass
        else:
            await channel.unary_unary(method)(request, timeout=timeout_s)
    except aio.AioRpcError as error:
        return to_failure(error)
    return None


async def healthy(channel: aio.Channel, which: int) -> tuple[int, ...]:
    """The tokens of a stream that has nothing to do with any of it."""
    request = generation(text="Once upon a time")
    request.sampling.MergeFrom(inference_pb2.SamplingParams(**HEALTHY[which]))
    request.stopping.max_new_tokens = 40
    last = b""
    async for message in channel.unary_stream(STREAM)(
        inference_pb2.StreamGenerateRequest(request=request).SerializeToString(), timeout=60
    ):
        last = message
    finished = inference_pb2.StreamGenerateResponse.FromString(last).finished
    return tuple(finished.candidates[0].token_ids)


def in_batches(items: Sequence[ItemT]) -> Iterator[Sequence[ItemT]]:
    for start in range(0, len(items), BESIDE):
        yield items[start : start + BESIDE]


def texts_of(failure: Failure) -> str:
    """Everything a client can read of an error."""
    details = " ".join(str(detail) for detail in failure.details.values())
    return f"{failure.text} {details} {failure.trailers}"


def check_form(name: str, failure: Failure) -> None:
    """What holds of every error of ours."""
    assert LEAK.search(texts_of(failure)) is None, f"{name}: {texts_of(failure)}"
    size = sum(len(key) + len(value) for key, value in failure.trailers.items())
    assert size < MAX_TRAILER_BYTES, name
    if not failure.details:  # gRPC's own: too large to be read at all
        assert failure.code.name == "RESOURCE_EXHAUSTED", (name, failure)
        return
    assert REASON.fullmatch(failure.reason), name
    assert "RequestInfo" in failure.details, name
    if failure.code is grpc.StatusCode.INVALID_ARGUMENT:
        assert failure.field or failure.reason == "MALFORMED_REQUEST", name
    if failure.code is grpc.StatusCode.NOT_FOUND:
        assert "ResourceInfo" in failure.details, name
