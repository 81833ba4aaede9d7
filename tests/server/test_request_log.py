"""What one refused request may add to the log."""

from __future__ import annotations

import logging

import pytest
from grpc import aio
from server_fixture import serving_server, to_failure

from fusionserve.v1 import inference_pb2 as pb

UNUSABLE = "x" * 100_000


async def refused_line(detail: str, request: pb.GenerateRequest, caplog: pytest.LogCaptureFixture) -> str:
    """The one line about the request, which has the id that its client is told."""
    caplog.set_level(logging.INFO, "fusionserve")
    async with serving_server(log_requests=detail) as served:
        with pytest.raises(aio.AioRpcError) as refused:
            await served.inference.Generate(request)
    (line,) = [record.getMessage() for record in caplog.records if "status=" in record.getMessage()]
    assert f"request='{to_failure(refused.value).trailers['x-request-id']}'" in line
    return line


async def test_unusable_id_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    request = pb.GenerateRequest(text="a", request_id=UNUSABLE)
    assert len(await refused_line("meta", request, caplog)) < 300


@pytest.mark.parametrize(
    "request_",
    [
        pb.GenerateRequest(text="a" * 100_000, request_id=UNUSABLE),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=range(50_000)), request_id=UNUSABLE),
    ],
    ids=["text", "token ids"],
)
async def test_prompt_of_a_refused_request_is_cut(
    request_: pb.GenerateRequest, caplog: pytest.LogCaptureFixture
) -> None:
    line = await refused_line("text", request_, caplog)
    assert len(line) < 1300
    assert "prompt=" in line
