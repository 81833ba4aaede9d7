"""A TCP connection whose cable can be cut: both ends stay open, and nothing gets through any more."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from fusionserve.client import AsyncClient, ClientError
from fusionserve.loadtest.hostile.child import FROZEN_S
from fusionserve.loadtest.hostile.target import LONG, PROMPT, Target

_CHUNK_BYTES = 1 << 16


class Cable:
    """A proxy in front of a server: clients that connect to `address` reach it until the cable is cut."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._is_whole = asyncio.Event()
        self._is_whole.set()
        self._writers: list[asyncio.StreamWriter] = []
        self._forwarding: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = "{}:{}".format(*self._server.sockets[0].getsockname())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._forwarding:
            task.cancel()
        await asyncio.gather(*self._forwarding, return_exceptions=True)
        for writer in self._writers:
            writer.close()

    def cut(self) -> None:
        """Stops forwarding in both directions; neither end is told."""
        self._is_whole.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += (writer, server_writer)
        self._forwarding += (
            asyncio.create_task(self._forward(reader, server_writer)),
            asyncio.create_task(self._forward(server_reader, writer)),
        )

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(_CHUNK_BYTES):
                await self._is_whole.wait()
                writer.write(data)
                await writer.drain()
            writer.write_eof()


async def be_cut_off(target: Target) -> None:
    """A client whose cable is cut in the middle of its stream, for longer than the server waits."""
    async with Cable(*target.grpc_endpoint) as cable, AsyncClient(cable.address) as client:
        with suppress(ClientError):
            async with client.stream(PROMPT, **LONG) as events:
                await anext(events, None)
                await anext(events, None)
                cable.cut()
                await asyncio.sleep(FROZEN_S)
