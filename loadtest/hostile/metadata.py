"""Calls with metadata that no server should take."""

from __future__ import annotations

import random
from collections.abc import Sequence

import grpc
from grpc import aio

from fusionserve.loadtest.hostile.raw import call_raw
from fusionserve.loadtest.hostile.target import PROMPT, Target
from fusionserve.v1 import inference_pb2 as pb
from fusionserve.v1.inference_pb2_grpc import InferenceServiceStub

GET_MODEL = b"/fusionserve.v1.InferenceService/GetModel"
Metadata = Sequence[tuple[str, str | bytes]]

TOO_LARGE: Metadata = (("x-large", "a" * 17_000),)
TOO_MANY: Metadata = tuple((f"x-key-{n}", "value" * 8) for n in range(500))
JUNK: Metadata = (("x-junk-bin", random.Random(1).randbytes(4000)), ("grpc-status-details-bin", b"\xff" * 99))
NO_TEXT = (
    (b"authorization", b"Bearer \xff\xfe"),
    *((b"x-key-%d" % n, b"secret \xff" * 8) for n in range(40)),
)


async def call_with_metadata(target: Target, metadata: Metadata) -> str:
    """The status of a short generation that carries it."""
    async with aio.insecure_channel(target.grpc) as channel:
        request = pb.GenerateRequest(text=PROMPT, stopping=pb.StoppingCriteria(max_new_tokens=2))
        try:
            await InferenceServiceStub(channel).Generate(request, metadata=tuple(metadata), timeout=30)
        except grpc.RpcError as error:
            assert isinstance(error, aio.AioRpcError)
            return error.code().name
        return grpc.StatusCode.OK.name


async def send_giant_metadata(target: Target) -> None:
    """One call of each kind."""
    for metadata in (TOO_LARGE, TOO_MANY, JUNK):
        await call_with_metadata(target, metadata)
    await call_raw(target, GET_MODEL, NO_TEXT)
