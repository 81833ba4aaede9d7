"""What a call can raise: one class per gRPC status, with the server's machine-readable details as attributes.

ClientError
+-- InvalidRequestError     a field is out of its range: see `field_violations`
+-- NotFoundError           no adapter of that name: see `resource_type`, `resource_name`
+-- AlreadyExistsError      the name is taken
+-- FailedPreconditionError right request, wrong state or unusable adapter files: see `reason`
+-- ResourceExhaustedError  no room at present: see `retry_after_s`
+-- UnavailableError        no connection, or the server is starting or draining
+-- DeadlineExceededError   the call's timeout passed
+-- AbortedError            ended by somebody else's command
+-- DataLossError           bytes on the server differ from their digest
+-- CancelledError          cancelled by this side, or its client is closed
+-- UnimplementedError      the server does not know the call
+-- AuthenticationError     missing or unknown credentials
+-- PermissionDeniedError   known credentials that do not allow the call: see `reason`
+-- InternalError           a bug of the server: quote `request_id` when you report it
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar, cast

import grpc
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

DETAILS_KEY = "grpc-status-details-bin"

DetailT = TypeVar("DetailT", bound=Message)


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of the request and what is wrong with it."""

    field: str
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorDetails:
    """The details the server attached to a status; fields of absent details are empty."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    field_violations: tuple[FieldViolation, ...] = ()
    resource_type: str = ""
    resource_name: str = ""
    retry_after_s: float | None = None
    request_id: str = ""


class ClientError(Exception):
    """A call failed with `status` (the gRPC code's name), the server's `reason`, `message` and `metadata`."""

    def __init__(self, status: str, message: str, details: ErrorDetails | None = None) -> None:
        details = details or ErrorDetails()
        super().__init__(" ".join(filter(None, (status, details.reason))) + f": {message}")
        self.status = status
        self.message = message
        self.reason = details.reason
        self.metadata = dict(details.metadata)
        self.field_violations = details.field_violations
        self.resource_type = details.resource_type
        self.resource_name = details.resource_name
        self.retry_after_s = details.retry_after_s
        self.request_id = details.request_id


class InvalidRequestError(ClientError):
    """The request is wrong whatever the server's state; `field_violations` names the fields."""


class NotFoundError(ClientError):
    """Nothing of type `resource_type` is called `resource_name`."""


class AlreadyExistsError(ClientError):
    """The name or request id is in use."""


class FailedPreconditionError(ClientError):
    """The server's state or an adapter's files do not allow the call; `reason` says which rule they break."""


class ResourceExhaustedError(ClientError):
    """No room at present; retry after `retry_after_s` seconds, or not at all if that is None."""


class UnavailableError(ClientError):
    """The server cannot be reached, is starting, or is draining."""


class DeadlineExceededError(ClientError):
    """The timeout of the call passed before it finished."""


class AbortedError(ClientError):
    """The call was ended by another command, such as a forced unload of its adapter."""


class DataLossError(ClientError):
    """The bytes of a file on the server differ from the digest they were promised to have."""


class CancelledError(ClientError):
    """The call was cancelled by this side, as by closing the client; not asyncio's, which cancels a task."""


class UnimplementedError(ClientError):
    """The server does not know the call; it may be older than this client."""


class AuthenticationError(ClientError):
    """The server does not know who is calling: the token is missing or wrong."""


class PermissionDeniedError(ClientError):
    """The token does not allow this call, or this adapter."""


class InternalError(ClientError):
    """A bug of the server; its log knows more under `request_id`."""


BY_STATUS: Mapping[grpc.StatusCode, type[ClientError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhaustedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.DATA_LOSS: DataLossError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.INTERNAL: InternalError,
}


@contextmanager
def typed_errors() -> Iterator[None]:
    """Turns what grpc and grpc.aio raise inside the block into a ClientError caused by the original."""
    try:
        yield
    except grpc.RpcError as error:
        raise to_client_error(error) from error
    except (ValueError, aio.UsageError) as error:  # no kinds of their own say that a channel is closed
        if "closed" not in str(error):
            raise
        raise CancelledError("CANCELLED", "the client is closed") from error


def cancelled_error() -> CancelledError:
    """What a call ends with that was cancelled on this side while the task that waits for it was not."""
    return CancelledError(
        "CANCELLED", "the client was closed meanwhile, or a wait for the call was cancelled"
    )


def to_client_error(error: grpc.RpcError) -> ClientError:
    """The typed form of `error`; a status without a class of its own is a plain ClientError."""
    # Both flavours of error are also calls, with the status as methods; the stubs do not say so.
    call = cast(grpc.Call, error)
    details = _read_details(call)
    kind = BY_STATUS.get(call.code(), ClientError)
    return kind(call.code().name, call.details() or "", details)


def _read_details(call: grpc.Call) -> ErrorDetails:
    """What the trailers say beyond code and text; a server of another kind says nothing, which is fine."""
    trailers = dict(call.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers.get(DETAILS_KEY, b""))
    info = _unpack(status, error_details_pb2.ErrorInfo())
    resource = _unpack(status, error_details_pb2.ResourceInfo())
    violations = _unpack(status, error_details_pb2.BadRequest()).field_violations
    return ErrorDetails(
        reason=info.reason,
        metadata=dict(info.metadata),
        field_violations=tuple(FieldViolation(each.field, each.description) for each in violations),
        resource_type=resource.resource_type,
        resource_name=resource.resource_name,
        retry_after_s=_retry_after_s(status),
        request_id=_unpack(status, error_details_pb2.RequestInfo()).request_id,
    )


def _retry_after_s(status: status_pb2.Status) -> float | None:
    retry = _unpack(status, error_details_pb2.RetryInfo())
    return float(retry.retry_delay.ToTimedelta().total_seconds()) if retry.HasField("retry_delay") else None


def _unpack(status: status_pb2.Status, detail: DetailT) -> DetailT:
    """Fills `detail` from the status; it stays empty if the status has none of its type."""
    for packed in status.details:
        if packed.Unpack(detail):
            break
    return detail
