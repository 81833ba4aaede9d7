"""How soon does a server notice that a client has gone, and give away what it held?

    python -P -m fusionserve.loadtest.slots_freed --repeats 10

A client in the middle of its streams cancels, is killed, is frozen, or loses its cable. Measured is the time from then
until /metrics shows no KV block used and no request running, again and again; a step is slowed down to 20 ms, so that
no generation ends by itself before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

from tqdm import tqdm

from fusionserve.client import AsyncClient, AsyncGenerationStream, GenerationChunk
from fusionserve.failpoints import VARIABLE
from fusionserve.loadtest.hostile.cable import Cable
from fusionserve.loadtest.hostile.child import streaming_child
from fusionserve.loadtest.hostile.target import LONG, PROMPT, Target
from fusionserve.loadtest.metrics_page import read_metrics
from fusionserve.loadtest.serving import server_process

Number = TypeVar("Number", int, float)

STEP_S = 0.02
_POLL_S = 0.005
_SETTLED_S = 0.4  # many steps
_TOKENS = "fusionserve_generated_tokens_total"
_GIVEN_UP_S = 60.0


async def until_free(target: Target) -> float:
    """Seconds until nothing is held; raises TimeoutError after a minute."""
    started_s = time.monotonic()
    async with asyncio.timeout(_GIVEN_UP_S):
        while True:
            page = await read_metrics(target.metrics)
            if not page["fusionserve_kv_blocks_used"] and not page["fusionserve_requests_running"]:
                return time.monotonic() - started_s
            await asyncio.sleep(_POLL_S)


async def after_cancel(target: Target) -> float:
    """A client gives its stream up."""
    async with AsyncClient(target.grpc) as client, client.stream(PROMPT, **LONG) as events:
        await _read_some(events)
        await events.close()
        return await until_free(target)


async def tokens_after_cancel(target: Target) -> int:
    """How many tokens a server computes beyond those its client has read as it gives up; a step is a token."""
    before = await read_metrics(target.metrics)
    async with AsyncClient(target.grpc) as client, client.stream(PROMPT, **LONG) as events:
        num_read = await _read_some(events)
        await events.close()
    await asyncio.sleep(_SETTLED_S)
    after = await read_metrics(target.metrics)
    return round(after[_TOKENS] - before[_TOKENS]) - num_read


async def after_kill(target: Target) -> float:
    """A client is killed."""
    async with streaming_child(target) as child:
        child.kill()
        return await until_free(target)


async def after_freeze(target: Target) -> float:
    """A client is frozen."""
    async with streaming_child(target) as child:
        child.freeze()
        return await until_free(target)


async def after_cut(target: Target) -> float:
    """A client's cable is cut."""
    async with (
        Cable(*target.grpc_endpoint) as cable,
        AsyncClient(cable.address) as client,
        client.stream(PROMPT, **LONG) as events,
    ):
        await _read_some(events)
        cable.cut()
        return await until_free(target)


EVENTS: Mapping[str, Callable[[Target], Awaitable[float]]] = {
    "cancelled": after_cancel,
    "killed": after_kill,
    "frozen": after_freeze,
    "cable cut": after_cut,
}


def main() -> None:
    """Serves, measures, prints a line per event."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--events", nargs="+", choices=list(EVENTS), default=list(EVENTS))
    arguments = parser.parse_args()
    os.environ[VARIABLE] = f"engine.step=sleep({STEP_S})"
    with server_process({"--dtype": "float32", "--log-level": "warning"}) as server:
        target = Target(grpc=server.grpc, metrics=server.metrics)
        print(f"{'client':12}{'p50':>9}{'largest':>9}   seconds until its blocks are free")
        for event in arguments.events:
            seconds = asyncio.run(_repeat(EVENTS[event], target, arguments.repeats))
            print(f"{event:12}{statistics.median(seconds):9.3f}{max(seconds):9.3f}", flush=True)
        beyond = asyncio.run(_repeat(tokens_after_cancel, target, arguments.repeats))
        print(
            f"tokens computed beyond those read before a cancel: p50 {statistics.median(beyond)}, at most {max(beyond)}"
        )


async def _repeat(
    measure: Callable[[Target], Awaitable[Number]], target: Target, repeats: int
) -> list[Number]:
    return [await measure(target) for _ in tqdm(range(repeats), leave=False, disable=None)]


async def _read_some(events: AsyncGenerationStream) -> int:
    """Reads a few messages and returns how many tokens were in them."""
    num_tokens = 0
    for _ in range(8):
        event = await anext(events)
        num_tokens += len(event.token_ids) if isinstance(event, GenerationChunk) else 0
    return num_tokens


if __name__ == "__main__":
    main()
