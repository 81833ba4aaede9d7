"""The id every call is known by in logs, errors and trailers."""

from __future__ import annotations

import string
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from fusionserve.errors import InvalidRequestError
from fusionserve.limits import MAX_REQUEST_ID_LENGTH
from fusionserve.v1 import inference_pb2

REQUEST_ID_KEY = "x-request-id"  # of the trailing metadata

# The id travels in trailing metadata, which takes printable ASCII only.
_PRINTABLE = frozenset(string.ascii_letters + string.digits + string.punctuation + " ")

# Each call runs in a task of its own, so what is set in one is seen by no other.
_CURRENT: ContextVar[str] = ContextVar("request_id", default="")


def current_request_id() -> str:
    """By what id the client knows the running call."""
    return _CURRENT.get()


@contextmanager
def known_by(request_id: str) -> Iterator[None]:
    """In its block that is the current request id."""
    before = _CURRENT.set(request_id)
    try:
        yield
    finally:
        _CURRENT.reset(before)


def request_id_of(request: object) -> str:
    """The client's id if it gave a usable one, else a minted one, put into the request if it has the field.

    An unusable id is left for `check_request_id` to refuse.
    """
    generation = request.request if isinstance(request, inference_pb2.StreamGenerateRequest) else request
    if not isinstance(generation, inference_pb2.GenerateRequest):
        return mint_request_id()
    if not generation.HasField("request_id"):
        generation.request_id = mint_request_id()
    return generation.request_id if _is_usable(generation.request_id) else mint_request_id()


def mint_request_id() -> str:
    """An id that no other call has."""
    return uuid.uuid4().hex


def check_request_id(request_id: str) -> None:
    """Raises InvalidRequestError unless the id has 1 to 128 printable ASCII characters, no outer space."""
    if not _is_usable(request_id):
        raise InvalidRequestError(
            f"request_id must have 1 to {MAX_REQUEST_ID_LENGTH} printable ASCII characters, no outer space",
            field="request_id",
            reason="REQUEST_ID_INVALID",
            metadata={"max_length": str(MAX_REQUEST_ID_LENGTH)},
        )


def _is_usable(request_id: str) -> bool:
    is_sized = 0 < len(request_id) <= MAX_REQUEST_ID_LENGTH
    return is_sized and _PRINTABLE.issuperset(request_id) and request_id == request_id.strip()
