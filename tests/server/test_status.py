"""The table from errors to statuses, as a client sees it."""

from __future__ import annotations

import asyncio
import logging

import pytest
from grpc import aio
from server_fixture import INFERENCE, Failure, Served, handled_total, to_failure

from fusionserve import errors
from fusionserve.server.status import CODES, to_ended_code, to_status
from fusionserve.v1 import inference_pb2 as pb

TABLE = [
    (errors.InvalidRequestError("m", field="f"), "INVALID_ARGUMENT", "INVALID_REQUEST"),
    (errors.NotFoundError("m", resource_type="adapter", resource_name="n"), "NOT_FOUND", "NOT_FOUND"),
    (errors.AlreadyExistsError("m", reason="REQUEST_ID_IN_USE"), "ALREADY_EXISTS", "REQUEST_ID_IN_USE"),
    (errors.ArtifactError("m", reason="PICKLE_REFUSED"), "FAILED_PRECONDITION", "PICKLE_REFUSED"),
    (errors.PreconditionError("m"), "FAILED_PRECONDITION", "FAILED_PRECONDITION"),
    (errors.ChecksumError("m"), "DATA_LOSS", "CHECKSUM_MISMATCH"),
    (errors.CapacityError("m"), "RESOURCE_EXHAUSTED", "CAPACITY"),
    (errors.UnavailableError("m"), "UNAVAILABLE", "UNAVAILABLE"),
    (errors.AbortedError("m"), "ABORTED", "ABORTED"),
    (errors.DeadlineError("m"), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
]
BUGS = [errors.InternalError("/secret"), ValueError("/secret"), KeyError("/secret"), MemoryError("/secret")]


async def fail(served: Served, error: BaseException) -> Failure:
    served.engine.error = error
    with pytest.raises(aio.AioRpcError) as caught:
        await served.inference.Generate(pb.GenerateRequest(request_id="r1", text="a"))
    return to_failure(caught.value)


def subclasses(kind: type) -> set[type]:
    return {kind}.union(*(subclasses(child) for child in kind.__subclasses__()))


def test_every_error_has_a_status() -> None:
    assert subclasses(errors.FusionServeError) - {errors.FusionServeError} == set(CODES)


@pytest.mark.parametrize(("error", "code", "reason"), TABLE, ids=lambda value: str(value)[:30])
async def test_error_becomes_its_status(
    served: Served, error: errors.FusionServeError, code: str, reason: str
) -> None:
    before = handled_total(INFERENCE, "Generate", code)
    failure = await fail(served, error)
    assert (failure.code.name, failure.reason, failure.text) == (code, reason, "m")
    assert failure.details["RequestInfo"].request_id == "r1"
    assert failure.trailers["x-request-id"] == "r1"
    assert handled_total(INFERENCE, "Generate", code) == before + 1


async def test_error_in_mid_stream_becomes_its_status(served: Served) -> None:
    served.engine.error_midway = errors.AbortedError("unloaded", reason="ADAPTER_UNLOADED")
    stream = served.inference.StreamGenerate(pb.StreamGenerateRequest(request=pb.GenerateRequest(text="a")))
    seen = []
    with pytest.raises(aio.AioRpcError) as caught:
        async for event in stream:
            seen.append(event.WhichOneof("event"))
    assert seen == ["started", "chunk"]
    assert to_failure(caught.value).reason == "ADAPTER_UNLOADED"
    assert served.engine.num_open == 0


async def test_metadata_and_resource_are_told(served: Served) -> None:
    failure = await fail(
        served,
        errors.NotFoundError("m", resource_type="adapter", resource_name="n", reason="ADAPTER_NOT_FOUND"),
    )
    resource = failure.details["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("adapter", "n")
    assert dict(failure.details["ErrorInfo"].metadata) == {"adapter": "n"}


@pytest.mark.parametrize("kind", [errors.CapacityError, errors.UnavailableError])
async def test_pushback_says_when_to_retry(served: Served, kind: type[errors.CapacityError]) -> None:
    failure = await fail(served, kind("full", retry_after_s=0.75))
    assert failure.trailers["grpc-retry-pushback-ms"] == "750"
    assert failure.details["RetryInfo"].retry_delay.ToMilliseconds() == 750


async def test_pushback_says_when_retrying_cannot_help(served: Served) -> None:
    failure = await fail(served, errors.CapacityError("never fits"))
    assert failure.trailers["grpc-retry-pushback-ms"] == "-1"
    assert "RetryInfo" not in failure.details


@pytest.mark.parametrize("error", BUGS, ids=lambda value: type(value).__name__)
async def test_bug_shows_the_request_id_only(
    served: Served, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        failure = await fail(served, error)
    assert (failure.code.name, failure.text, failure.reason) == ("INTERNAL", "internal error", "INTERNAL")
    assert set(failure.details) == {"ErrorInfo", "RequestInfo"}
    assert failure.details["RequestInfo"].request_id == "r1"
    assert b"secret" not in failure.trailers["grpc-status-details-bin"]
    (record,) = [record for record in caplog.records if record.name.startswith("fusionserve")]
    assert "r1" in record.getMessage()
    assert record.exc_info is not None and record.exc_info[1] is error


async def test_server_goes_on_after_a_bug(served: Served) -> None:
    await fail(served, ValueError("x"))
    assert (await served.inference.Generate(pb.GenerateRequest(text="a"))).candidates


class Calling:
    """The context of a call, as far as its end needs it."""

    def __init__(self, remaining_s: float | None) -> None:
        self._remaining_s = remaining_s

    def time_remaining(self) -> float | None:
        return self._remaining_s


@pytest.mark.parametrize("error", [asyncio.CancelledError(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize(
    ("remaining_s", "code"),
    [(None, "CANCELLED"), (0.5, "CANCELLED"), (0.05, "DEADLINE_EXCEEDED"), (-1.0, "DEADLINE_EXCEEDED")],
)
def test_call_ended_from_outside_was_cancelled_or_late(
    error: BaseException, remaining_s: float | None, code: str
) -> None:
    assert to_ended_code(error, Calling(remaining_s)).name == code


def test_call_ended_by_an_error_has_its_code() -> None:
    assert to_ended_code(errors.DeadlineError("m"), Calling(None)).name == "DEADLINE_EXCEEDED"
    assert to_ended_code(ValueError("m"), Calling(0.0)).name == "INTERNAL"


def test_status_fits_into_trailers_whatever_the_text() -> None:
    error = errors.InvalidRequestError("é" * 100_000, field="f", metadata={"key": "é" * 100_000})
    status = to_status(error, "r")
    assert len(status.SerializeToString()) < 4096
    assert status.message.endswith("...")
