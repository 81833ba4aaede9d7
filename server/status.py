"""The one table from errors to gRPC statuses, and what a status carries besides its code."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from fusionserve.errors import (
    AbortedError,
    AlreadyExistsError,
    ArtifactError,
    CapacityError,
    ChecksumError,
    DeadlineError,
    FusionServeError,
    HeldByFusionsError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    StartupError,
    TrainingError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from fusionserve.server.request_ids import REQUEST_ID_KEY

DOMAIN = "fusionserve"
INTERNAL_TEXT = "internal error"

CODES: Mapping[type[FusionServeError], grpc.StatusCode] = {
    InvalidRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    AlreadyExistsError: grpc.StatusCode.ALREADY_EXISTS,
    ArtifactError: grpc.StatusCode.FAILED_PRECONDITION,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    HeldByFusionsError: grpc.StatusCode.FAILED_PRECONDITION,
    ChecksumError: grpc.StatusCode.DATA_LOSS,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    AbortedError: grpc.StatusCode.ABORTED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    InternalError: grpc.StatusCode.INTERNAL,
    StartupError: grpc.StatusCode.INTERNAL,
    TrainingError: grpc.StatusCode.INTERNAL,
}

Trailers = tuple[tuple[str, str | bytes], ...]

# A client whose deadline passes cancels, and what is left of it here is what gRPC rounded up and the way took.
_LATE_S = 0.1

_DETAILS_KEY = "grpc-status-details-bin"
_PUSHBACK_KEY = "grpc-retry-pushback-ms"
# Both texts travel twice in trailers, which gRPC bounds at 8 KiB in all.
_MAX_TEXT_LENGTH = 1000
_MAX_METADATA_LENGTH = 200


def to_code(error: BaseException) -> grpc.StatusCode:
    """The status code of any exception: the nearest class in the table, INTERNAL for what is not ours."""
    for kind in type(error).__mro__:
        if kind in CODES:
            return CODES[kind]
    return grpc.StatusCode.INTERNAL


def to_ended_code(error: BaseException, context: aio.ServicerContext[Any, Any]) -> grpc.StatusCode:
    """As `to_code`, for an error or for a call that was ended from outside: by its client or its deadline."""
    if not isinstance(error, asyncio.CancelledError | GeneratorExit):
        return to_code(error)
    remaining_s = context.time_remaining()
    is_late = remaining_s is not None and remaining_s < _LATE_S
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_late else grpc.StatusCode.CANCELLED


def to_status(error: BaseException, request_id: str) -> status_pb2.Status:
    """The status with its details; a bug of ours shows nothing but the request's id."""
    code = to_code(error)
    text = INTERNAL_TEXT
    if isinstance(error, FusionServeError) and code is not grpc.StatusCode.INTERNAL:
        text = _bounded(error.message, _MAX_TEXT_LENGTH)
    status = status_pb2.Status(code=code.value[0], message=text)
    for detail in _details(error, request_id):
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_trailers(error: BaseException, status: status_pb2.Status, request_id: str) -> Trailers:
    """The trailing metadata that carries `status` and says whether and when to retry (gRFC A6)."""
    trailers: Trailers = ((_DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id))
    if isinstance(error, CapacityError | UnavailableError):
        if error.retry_after_s is not None:
            return (*trailers, (_PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
        if isinstance(error, CapacityError):
            return (*trailers, (_PUSHBACK_KEY, "-1"))  # negative: do not retry
    return trailers


def _details(error: BaseException, request_id: str) -> Iterator[Message]:
    if not isinstance(error, FusionServeError) or to_code(error) is grpc.StatusCode.INTERNAL:
        yield error_details_pb2.ErrorInfo(reason=InternalError.default_reason, domain=DOMAIN)
    else:
        metadata = {key: _bounded(value, _MAX_METADATA_LENGTH) for key, value in error.metadata.items()}
        yield error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=metadata)
        yield from _specific_details(error)
    yield error_details_pb2.RequestInfo(request_id=request_id)


def _specific_details(error: FusionServeError) -> Iterator[Message]:
    text = _bounded(error.message, _MAX_METADATA_LENGTH)
    if isinstance(error, InvalidRequestError):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=text)
        yield error_details_pb2.BadRequest(field_violations=[violation])
    elif isinstance(error, NotFoundError):
        yield error_details_pb2.ResourceInfo(
            resource_type=error.resource_type,
            resource_name=_bounded(error.resource_name, _MAX_METADATA_LENGTH),
            description=text,
        )
    elif isinstance(error, CapacityError | UnavailableError) and error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def _bounded(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else f"{text[: max_length - 3]}..."
