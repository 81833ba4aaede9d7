"""Whether one adapter that floods the server holds up the others.

    python -m fusionserve.loadtest.fair_share

The rest of the load, single requests at random moments (Poisson) under four adapters, is measured by itself and beside
a flood under a fifth: as many streams at once as `--flood` says, each followed by the next, far more than the server
can serve. Rounds of both take turns. Time to first token is from the client's call to the first chunk.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from typing import Any

from fusionserve.client import AsyncClient, ClientError, GenerationChunk
from fusionserve.loadtest.latency import Spread
from fusionserve.loadtest.serving import serving

HOT = "changelog"
REST = ("cpp", "perl", "polish", "spanish")
_PROMPT_TOKENS = 96
_HOT_TOKENS, _REST_TOKENS = 64, 16
_SETTLE_S = 2.0
_RETRY_S = 0.05


@dataclass(slots=True)
class Tally:
    """What became of one side's requests."""

    ttft_s: list[float] = field(default_factory=list)
    num_tokens: int = 0  # of prompts and outputs
    num_refused: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0, help="length of a round")
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second of the rest")
    parser.add_argument("--flood", type=int, default=200, help="streams at once of the flood")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-step-time", default="60ms", help="of the server")
    arguments = parser.parse_args(argv)
    if arguments.flood < 1:
        parser.error("--flood must be at least 1")
    flags = {"--dtype": arguments.dtype, "--prompt-step-time": arguments.prompt_step_time}
    with serving({**flags, "--prefix-cache": "off", "--log-level": "error"}) as (address, _):
        asyncio.run(_measure(address, arguments))
    return 0


async def _measure(address: str, arguments: argparse.Namespace) -> None:
    ratios: list[float] = []
    print("round  rest alone p50/p99 ms   beside the flood p50/p99 ms   ratio of p99   share of the flood")
    async with AsyncClient(address) as client:
        for name in (HOT, *REST):
            await client.adapters.load(name, pin=True)
        for number in range(arguments.rounds):
            alone = await _rest(client, arguments, number)
            with _flooding(address, arguments.flood) as hot:
                await asyncio.sleep(_SETTLE_S)
                before_tokens = hot.num_tokens
                beside = await _rest(client, arguments, number)
                hot_tokens = hot.num_tokens - before_tokens
            before, after = Spread.of(alone.ttft_s), Spread.of(beside.ttft_s)
            assert before is not None and after is not None, "no request of the rest was served"
            share = hot_tokens / (hot_tokens + beside.num_tokens)
            ratios.append(after.p99 / before.p99)
            print(
                f"{number + 1:5d}  {before.p50 * 1e3:12.0f} / {before.p99 * 1e3:.0f}"
                f"  {after.p50 * 1e3:24.0f} / {after.p99 * 1e3:.0f}  {ratios[-1]:16.2f}  {share:16.0%}"
                f"   refused: {beside.num_refused} of the rest, {hot.num_refused} of the flood"
            )
    print(f"median ratio of p99: {statistics.median(ratios):.2f}")


async def _rest(client: AsyncClient, arguments: argparse.Namespace, seed: int) -> Tally:
    """One round of the rest: the same moments and adapters for the same seed."""
    draws, tally = random.Random(seed), Tally()
    end_s = time.monotonic() + arguments.seconds
    async with asyncio.TaskGroup() as group:
        while time.monotonic() < end_s:
            await asyncio.sleep(draws.expovariate(arguments.rate))
            group.create_task(_one(client, draws.choice(REST), _REST_TOKENS, draws.randrange(1 << 30), tally))
    return tally


class Flood:
    """What a flood in a process of its own has had, for its clients must not hold up those that are measured."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._tokens, self._refused = context.Value("q", 0), context.Value("q", 0)
        self._start = context.Process

    @property
    def num_tokens(self) -> int:
        """Of prompts and outputs."""
        return int(self._tokens.value)

    @property
    def num_refused(self) -> int:
        """Requests that the server did not take."""
        return int(self._refused.value)

    def start(self, address: str, num_streams: int) -> BaseProcess:
        """The process, running."""
        arguments = (address, num_streams, self._tokens, self._refused)
        process = self._start(target=_run_flood, args=arguments, daemon=True)
        process.start()
        return process


@contextlib.contextmanager
def _flooding(address: str, num_streams: int) -> Iterator[Flood]:
    flood = Flood()
    process = flood.start(address, num_streams)
    try:
        while flood.num_tokens == 0:
            if not process.is_alive():
                raise SystemExit("the flood has ended before it began")
            time.sleep(0.05)
        yield flood
    finally:
        process.kill()
        process.join()


def _run_flood(address: str, num_streams: int, tokens: Any, refused: Any) -> None:
    asyncio.run(_flood(address, num_streams, tokens, refused))


async def _flood(address: str, num_streams: int, tokens: Any, refused: Any) -> None:
    tally = Tally()

    async def repeat(seed: int) -> None:
        while True:
            await _one(client, HOT, _HOT_TOKENS, seed, tally)
            tokens.value, refused.value = tally.num_tokens, tally.num_refused
            seed += num_streams

    async with AsyncClient(address) as client:
        await asyncio.gather(*(repeat(number) for number in range(num_streams)))


async def _one(client: AsyncClient, adapter: str, num_tokens: int, seed: int, tally: Tally) -> None:
    draws = random.Random(seed)
    prompt = [draws.randrange(1, 4000) for _ in range(_PROMPT_TOKENS)]
    started_s, is_first = time.monotonic(), True
    stream = client.stream(prompt, adapter=adapter, max_new_tokens=num_tokens, ignore_eos=True, seed=seed)
    try:
        async for event in stream:
            if isinstance(event, GenerationChunk):
                if is_first:
                    tally.ttft_s.append(time.monotonic() - started_s)
                    tally.num_tokens += _PROMPT_TOKENS
                    is_first = False
                tally.num_tokens += len(event.token_ids)
    except ClientError:
        tally.num_refused += 1
        await asyncio.sleep(_RETRY_S)


if __name__ == "__main__":
    sys.exit(main())
