"""A gRPC server that reads the names of its own methods only.

grpc.aio decodes a call's name where it accepts calls: one name that is not UTF-8 ends that loop, and with it the
listener, before any interceptor is asked. But gRPC's core knows registered methods by itself and hands their calls out
apart from all others. So whatever comes among the others is no method of ours, and is refused, its name unread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any, cast

import grpc
from grpc import aio
from grpc.aio import _server

cygrpc: Any = import_module("grpc._cython.cygrpc")  # which has no types

# Releases of which it is known that what follows fits. Those before decode names in each call's own task.
_FROM, _BEFORE = (1, 84), (1, 86)

Options = tuple[tuple[str, int], ...]
Refuse = Callable[[Any, Any], Awaitable[None]]


def make_server(interceptor: aio.ServerInterceptor, options: Options, refuse: Refuse) -> aio.Server:
    """A server whose services must register their methods; `refuse` answers the calls of all others.

    With other releases of grpcio it is grpc.aio's own, and calls of all others meet the interceptor.
    """
    if _FROM <= tuple(int(part) for part in grpc.__version__.split(".")[:2]) < _BEFORE:
        return cast(aio.Server, _Server(interceptor, options, refuse))
    return aio.server(interceptors=(interceptor,), options=options)


def is_accepting(server: aio.Server) -> bool:
    """False once the server takes no more calls, told to stop or not; True where this release does not tell."""
    is_running = getattr(getattr(server, "_server", None), "is_running", None)
    return is_running is None or is_running()


class _Server(_server.Server):
    """grpc.aio's, around another core."""

    def __init__(self, interceptor: aio.ServerInterceptor, options: Options, refuse: Refuse) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = _KnownMethods(self._loop, None, (), (interceptor,), options, None)
        self._server.refusing = _Refusing(refuse, self._loop)


class _KnownMethods(cygrpc.AioServer):  # type: ignore[misc]
    """grpc.aio's accept loop, which gets no calls but those of registered methods."""

    refusing: _Refusing

    async def _request_call(self) -> None:
        """The next call of a method that is not registered: there is none, for each is refused at once."""
        while True:
            self.refusing.refuse(await super()._request_call())


class _Refusing:
    """Answers calls as grpc.aio would if every name were a method with `refuse` for a handler."""

    def __init__(self, refuse: Refuse, loop: asyncio.AbstractEventLoop) -> None:
        self._handler: Any = grpc.stream_stream_rpc_method_handler(refuse)
        self._loop = loop
        self._tasks: set[asyncio.Task[None]] = set()

    def refuse(self, call: Any) -> None:
        """Answers it in a task of its own."""
        answering = cygrpc._handle_rpc("", self, (), call, self._loop, False)
        task = self._loop.create_task(cygrpc._schedule_rpc_coro(answering, call, self._loop, ""))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def resolve_handler(self, details: grpc.HandlerCallDetails) -> Any:
        """Of grpc.aio's resolver."""
        return self._handler
