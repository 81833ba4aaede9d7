"""This server through its front door: a `fusionserve serve` process, and one gRPC client for every stream."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

from fusionserve import __version__
from fusionserve.client import AsyncClient, GenerateOptions, Generation, GenerationChunk
from fusionserve.loadtest.bench.drivers.served_files import kv_cache_bytes, pool_ranks
from fusionserve.loadtest.bench.drivers.streams import EndedStream, run_streams
from fusionserve.loadtest.bench.protocol import FUSION, MIXED, Job, Outcome, Setup, answer_jobs
from fusionserve.loadtest.serving import Flags, serving


class Wire:
    """A server process and as many clients, each with a channel of its own, as there are streams."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.versions = {"fusionserve": __version__}
        self._server = ExitStack()
        target, _ = self._server.enter_context(serving(_serve_flags(setup)))
        self._loop = asyncio.Runner()
        self._open_clients = AsyncExitStack()
        self._clients = self._loop.run(self._connect(target))

    def run(self, job: Job) -> Outcome:
        """All streams at once."""
        return self._loop.run(run_streams(self._stream(job, stream) for stream in range(len(job.prompts))))

    def close(self) -> None:
        """Closes the clients and stops the server."""
        self._loop.run(self._open_clients.aclose())
        self._loop.close()
        self._server.close()

    async def _connect(self, target: str) -> list[AsyncClient]:
        streams = range(self._setup.num_streams)
        return [await self._open_clients.enter_async_context(AsyncClient(target)) for _ in streams]

    async def _stream(self, job: Job, stream: int) -> EndedStream:
        first_token_s = 0.0
        client, prompt = self._clients[stream], job.prompts[stream]
        async for event in client.stream(prompt, **self._options(job, stream)):
            if isinstance(event, GenerationChunk):
                first_token_s = first_token_s or time.monotonic()
            elif isinstance(event, Generation):
                return EndedStream(first_token_s, list(event.token_ids))
        raise RuntimeError("a stream ended without a result")

    def _options(self, job: Job, stream: int) -> GenerateOptions:
        options = GenerateOptions(
            temperature=job.temperature,
            top_p=job.top_p,
            seed=stream,
            max_new_tokens=job.new_tokens,
            ignore_eos=True,
            stream_interval=int(self._setup.options.get("stream_interval", 1)),
        )
        if job.kind == MIXED:
            options["adapter"] = Path(self._setup.adapters[self._setup.adapter_of(stream)]).name
        elif job.kind == FUSION:
            options["fusion"] = Path(self._setup.fusion).name
        return options


def _serve_flags(setup: Setup) -> Flags:
    return {
        "--model": setup.model,
        "--dtype": "bfloat16",
        "--adapter-dir": Path(setup.adapters[0]).parent,
        "--fusion-dir": Path(setup.fusion).parent,
        "--allow-base-mismatch": "on",
        "--max-context-tokens": setup.tokens_per_stream + 64,
        "--kv-cache-size": kv_cache_bytes(setup),
        "--adapter-pool-ranks": pool_ranks(setup),
        "--threads": setup.num_threads,
    }


if __name__ == "__main__":
    answer_jobs(Wire)
