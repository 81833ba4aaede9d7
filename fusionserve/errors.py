"""Every error a user can cause or meet, as one tree; `server/status.py` maps the classes to gRPC statuses.

FusionServeError
+-- InvalidRequestError      the request itself is wrong             INVALID_ARGUMENT
+-- NotFoundError            a name nobody knows                     NOT_FOUND
+-- AlreadyExistsError       a name or request id is taken           ALREADY_EXISTS
+-- ArtifactError            a file on disk cannot be served         FAILED_PRECONDITION
+-- PreconditionError        right request, wrong state              FAILED_PRECONDITION
|   +-- HeldByFusionsError   an adapter that is a fusion's member
+-- ChecksumError            bytes differ from their digest          DATA_LOSS
+-- CapacityError            no room at present                      RESOURCE_EXHAUSTED
+-- UnavailableError         starting, draining or broken            UNAVAILABLE
+-- AbortedError             ended by somebody else's command        ABORTED
+-- DeadlineError            the caller's deadline passed            DEADLINE_EXCEEDED
+-- UnauthenticatedError     no token, or an unknown one             UNAUTHENTICATED
+-- PermissionDeniedError    the token does not allow it             PERMISSION_DENIED
+-- UnimplementedError       a method the server does not have       UNIMPLEMENTED
+-- InternalError            our bug; carries no detail              INTERNAL
+-- StartupError             the server cannot start (command line only)
+-- TrainingError            a training run cannot start or go on (command line only)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


class FusionServeError(Exception):
    """An error with a stable UPPER_SNAKE `reason`, a text safe to show, and string `metadata`."""

    default_reason = "INTERNAL"

    def __init__(self, message: str, *, reason: str = "", metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = dict(metadata or {})


class InvalidRequestError(FusionServeError):
    """The field `field` of a request has a value outside its documented range."""

    default_reason = "INVALID_REQUEST"

    def __init__(
        self, message: str, *, field: str, reason: str = "", metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.field = field


class NotFoundError(FusionServeError):
    """No resource of type `resource_type` has the name `resource_name`."""

    default_reason = "NOT_FOUND"

    def __init__(self, message: str, *, resource_type: str, resource_name: str, reason: str = "") -> None:
        super().__init__(message, reason=reason, metadata={resource_type: resource_name})
        self.resource_type = resource_type
        self.resource_name = resource_name


class AlreadyExistsError(FusionServeError):
    """The name or id is in use."""

    default_reason = "ALREADY_EXISTS"


class ArtifactError(FusionServeError):
    """An adapter on disk cannot be served; `reason` says which rule it breaks."""

    default_reason = "ARTIFACT_UNUSABLE"


class PreconditionError(FusionServeError):
    """The request is well formed, but the server's state does not allow it."""

    default_reason = "FAILED_PRECONDITION"


class HeldByFusionsError(PreconditionError):
    """An adapter is not unloaded, because loaded fusions have it as a member."""

    def __init__(self, adapter: str, fusions: Sequence[str], num_unnamed: int = 0) -> None:
        names = [*fusions, *([f"{num_unnamed} more"] if num_unnamed else [])]
        super().__init__(
            f"adapter {adapter} is a member of loaded fusions ({', '.join(names)}): unload those first",
            reason="ADAPTER_HELD_BY_FUSION",
            metadata={"adapter": adapter, "fusions": ",".join(fusions)},
        )
        self.adapter, self.fusions = adapter, tuple(fusions)

    def naming(self, may_know: Callable[[str], bool]) -> HeldByFusionsError:
        """The same for somebody who may not know all fusions."""
        known = [name for name in self.fusions if may_know(name)]
        return HeldByFusionsError(self.adapter, known, len(self.fusions) - len(known))


class ChecksumError(FusionServeError):
    """The bytes of a file differ from the digest they were promised to have."""

    default_reason = "CHECKSUM_MISMATCH"


class CapacityError(FusionServeError):
    """There is no room at present; `retry_after_s` is a hint, None means retrying cannot help."""

    default_reason = "CAPACITY"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_s = retry_after_s


class UnavailableError(FusionServeError):
    """The server is starting, draining or broken; another replica may serve the call, or this one later."""

    default_reason = "UNAVAILABLE"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message, reason=reason, metadata=metadata)
        self.retry_after_s = retry_after_s


class AbortedError(FusionServeError):
    """The request was ended by another command, such as a forced unload of its adapter."""

    default_reason = "ABORTED"


class DeadlineError(FusionServeError):
    """The caller's deadline passed before the request finished."""

    default_reason = "DEADLINE_EXCEEDED"


class UnauthenticatedError(FusionServeError):
    """The call brings no bearer token, or one that the server does not know."""

    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(FusionServeError):
    """The caller is known, and may not do this."""

    default_reason = "PERMISSION_DENIED"


class UnimplementedError(FusionServeError):
    """The server has no such method; it may be older than its client."""

    default_reason = "METHOD_NOT_FOUND"


class InternalError(FusionServeError):
    """A bug of ours; the text never says more than that."""

    default_reason = "INTERNAL"


class StartupError(FusionServeError):
    """The server cannot start with this model or configuration; shown as one line by the command line."""

    default_reason = "STARTUP_FAILED"


class TrainingError(FusionServeError):
    """A training run cannot start with these data or this configuration, or cannot go on; shown as one line."""

    default_reason = "TRAINING_FAILED"
