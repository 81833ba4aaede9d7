"""A server that hostile clients are let loose on, and the healthy stream beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from server_process import ServerProcess, server_process

from fusionserve.client import AsyncClient, Client, GenerateOptions, GenerationChunk
from fusionserve.loadtest.hostile.target import Target

HEALTHY: GenerateOptions = {
    "adapter": "perl",
    "temperature": 0.8,
    "seed": 5,
    "max_new_tokens": 60,
    "ignore_eos": True,
}
PROMPT = "sub new {"
HELD = (
    "fusionserve_kv_blocks_used",
    "fusionserve_requests_running",
    "fusionserve_requests_queued",
    "fusionserve_requests_open",
    "fusionserve_adapter_pool_ranks_held",
    "fusionserve_adapter_leases",
    "fusionserve_fusion_leases",
)


@dataclass
class BesetServer:
    """A server process as a target, with the tokens a healthy stream gets when it is alone."""

    process: ServerProcess
    expected: tuple[int, ...] = field(default=())

    @property
    def target(self) -> Target:
        """Where it listens."""
        return Target(grpc=self.process.grpc, metrics=self.process.metrics)

    async def stream(self) -> tuple[int, ...]:
        """The tokens of one healthy stream."""
        tokens: list[int] = []
        async with AsyncClient(self.process.grpc) as client, client.stream(PROMPT, **HEALTHY) as events:
            async for event in events:
                if isinstance(event, GenerationChunk):
                    tokens += event.token_ids
        return tuple(tokens)

    async def free_within(self, seconds: float) -> float:
        """Waits until nothing is held, and returns how long that took."""
        started_s = time.monotonic()
        while True:
            page = await asyncio.to_thread(self.process.scrape)
            held = {name: page[name] for name in HELD if page[name]}
            if not held:
                return time.monotonic() - started_s
            assert time.monotonic() - started_s < seconds, f"still held: {held}"
            await asyncio.sleep(0.01)


@contextmanager
def beset_server(*arguments: str, failpoints: str = "") -> Iterator[BesetServer]:
    """One in a process of its own; its clean exit is part of what is tested."""
    with server_process(*arguments, failpoints=failpoints) as process:
        server = BesetServer(process)
        with Client(process.grpc, timeout_s=60) as client:
            server.expected = client.generate(PROMPT, **HEALTHY).token_ids
        yield server
        process.terminate()
        assert process.wait() == 0, process.log
        assert "Traceback" not in process.log
        assert " ERROR " not in process.log


@asynccontextmanager
async def healthy_beside(server: BesetServer) -> AsyncIterator[None]:
    """While in its block healthy streams run, one after the other; each must have the tokens it has alone."""

    async def repeat() -> None:
        while not is_over:
            assert await server.stream() == server.expected

    is_over = False
    streaming = asyncio.create_task(repeat())
    try:
        yield
    finally:
        is_over = True
        await streaming
