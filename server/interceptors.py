"""What surrounds every call: requests that cannot be taken, errors as statuses, method metrics."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from fusionserve.errors import (
    CapacityError,
    FusionServeError,
    InvalidRequestError,
    UnavailableError,
    UnimplementedError,
)
from fusionserve.server.access import Access, called_by
from fusionserve.server.idle_calls import IdleCalls
from fusionserve.server.method_metrics import MethodCall
from fusionserve.server.paced_writes import PacedWrites
from fusionserve.server.request_ids import REQUEST_ID_KEY, known_by, mint_request_id, request_id_of
from fusionserve.server.status import to_code, to_ended_code, to_status, to_trailers
from fusionserve.server.tokens import Token

logger = logging.getLogger(__name__)

# grpc types these by request and response; one wrapper serves every method, so they are open here.
Context = Any
Handler = Any
Behaviour = Callable[[Any, Context], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Refused:
    """Stands for a request that is too large or no message; grpc.aio answers UNKNOWN if a deserializer raises."""

    error: FusionServeError


class CallInterceptor(aio.ServerInterceptor):
    """Gives every call a request id, exactly one status from the table, and its place in the metrics.

    Callers without the rights for a method, and requests of more than `max_message_bytes`, are refused here, before
    anything of the request is read. A client that does not take a message for `write_timeout_s` gets no more of them.
    """

    def __init__(self, max_message_bytes: int, write_timeout_s: float, access: Access) -> None:
        self._max_message_bytes = max_message_bytes
        self._write_timeout_s = write_timeout_s
        self._access = access
        self._idle_calls = IdleCalls()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """The method's handler, wrapped."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return grpc.stream_stream_rpc_method_handler(refuse_method)
        method = handler_call_details.method
        try:
            token = self._access.admit(method, handler_call_details.invocation_metadata or ())
        except FusionServeError as error:
            return grpc.stream_stream_rpc_method_handler(_refusal(error, MethodCall(method, handler)))
        behaviour = _to_behaviour(handler, self._write_timeout_s)
        behaviour = _guard(self._idle_calls.bounding(behaviour, method), handler, method, token)
        return _wrap(behaviour, handler, self._max_message_bytes)


async def refuse_method(requests: AsyncIterator[bytes], context: Context) -> None:
    """Answers as a method would; not measured, for a client could make up any number of names."""
    await _answer(UnimplementedError("the server has no such method"), mint_request_id(), context)


def _refusal(error: FusionServeError, call: MethodCall) -> Behaviour:
    """A handler, of any method, that gives the error for an answer."""

    async def refuse(requests: Any, context: Context) -> None:
        await _abort(error, call, mint_request_id(), context)

    return refuse


def _wrap(behaviour: Behaviour, handler: Handler, max_message_bytes: int) -> Handler:
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(
        behaviour,
        request_deserializer=_tolerant(handler.request_deserializer, max_message_bytes),
        response_serializer=handler.response_serializer,
    )


def _tolerant(deserialize: Callable[[bytes], Any], max_message_bytes: int) -> Callable[[bytes], Any]:
    def parse(data: bytes) -> Any:
        if len(data) > max_message_bytes:
            return Refused(_too_large(len(data), max_message_bytes))
        try:
            return deserialize(data)
        except (DecodeError, UnicodeDecodeError):
            return Refused(_malformed())

    return parse


def _to_behaviour(handler: Handler, write_timeout_s: float) -> Behaviour:
    """The handler's method as an awaitable of (request, context), whichever of grpc.aio's shapes it has.

    A generator's messages are written from here, so that it is closed at once when the call ends while it is
    parked in a `yield`; grpc.aio leaves that to the garbage collector.
    """
    behaviour: Any = (
        handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
    )
    if not inspect.isasyncgenfunction(behaviour):
        assert inspect.iscoroutinefunction(behaviour), f"{behaviour} is not asynchronous"
        return cast(Behaviour, behaviour)

    async def write_all(request: Any, context: Context) -> None:
        await PacedWrites(behaviour(request, context), context, write_timeout_s).run()

    return write_all


def _guard(behaviour: Behaviour, handler: Handler, method: str, token: Token) -> Behaviour:
    async def guarded(request: Any, context: Context) -> Any:
        call = MethodCall(method, handler)
        request_id = request_id_of(request)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))
        try:
            with called_by(token), known_by(request_id):
                response = await behaviour(_checked(request, handler), context)
        except aio.AbortError:
            call.end(context.code())  # the handler has answered by itself
            raise
        except aio.InternalError:  # nothing can be written: the client is gone or the server stopped
            call.end(grpc.StatusCode.CANCELLED)
            # grpc.aio would log the stack, and a client could fill the log with it.
            raise asyncio.CancelledError from None
        except asyncio.CancelledError as error:
            if _is_cancelled_from_outside():
                call.end(to_ended_code(error, context))
                raise
            # grpc.aio would leave the client without an answer.
            stopped = UnavailableError("the request was stopped by the server", reason="REQUEST_STOPPED")
            request = None
            await _abort(stopped, call, request_id, context)
        except Exception as error:
            request = None  # see `_let_go`
            await _abort(error, call, request_id, context)
        call.end(grpc.StatusCode.OK)
        return response

    return guarded


def _is_cancelled_from_outside() -> bool:
    """True if the call was cancelled by client, deadline or the server's end, not by what it awaited."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _checked(request: Any, handler: Handler) -> Any:
    if handler.request_streaming:
        return _checked_stream(request)
    return _parsed(request)


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _parsed(request)


def _parsed(request: Any) -> Any:
    if isinstance(request, Refused):
        raise request.error
    return request


def _malformed() -> InvalidRequestError:
    return InvalidRequestError("the request is not a valid message", field="", reason="MALFORMED_REQUEST")


def _too_large(num_bytes: int, max_bytes: int) -> CapacityError:
    return CapacityError(
        f"the request has {num_bytes} bytes, at most {max_bytes} are taken",
        reason="MESSAGE_TOO_LARGE",
        metadata={"bytes": str(num_bytes), "max_bytes": str(max_bytes)},
    )


async def _abort(error: Exception, call: MethodCall, request_id: str, context: Context) -> NoReturn:
    code = to_code(error)
    if code is grpc.StatusCode.INTERNAL:
        logger.error("%s failed, request id %s", call.method, request_id, exc_info=error)
    call.end(code)  # before the client can know
    _let_go(error)
    await _answer(error, request_id, context)


def _let_go(error: BaseException) -> None:
    """Drops the tracebacks of an error.

    grpc.aio keeps the exception that its `abort` raises, and with it every frame on the way and whatever the request
    took, in a cycle with the call: megabytes that stay until the collector looks at its oldest generation.
    """
    chain: BaseException | None = error
    while chain is not None:
        chain.__traceback__ = None
        chain = chain.__cause__ or chain.__context__


async def _answer(error: Exception, request_id: str, context: Context) -> NoReturn:
    status = to_status(error, request_id)
    try:
        await context.abort(to_code(error), status.message, to_trailers(error, status, request_id))
    except aio.InternalError:  # as above: the client has gone meanwhile
        raise asyncio.CancelledError from None
    raise AssertionError("abort raises")
