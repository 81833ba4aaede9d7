"""Do streams keep their speed and their tokens while hostile clients are there?

    python -P -m fusionserve.loadtest.beside_hostile

For each kind of hostile client, which has a process of its own: one healthy stream after the other with nobody there,
then beside the client until it has gone. Prints the p50 of the gaps between tokens in both, their ratio, and how many
streams had other tokens than alone. Hostile clients that generate share the batch, as honest ones would: the first line
is three honest streams.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise

from tqdm import tqdm

from fusionserve.client import AsyncClient, GenerateOptions, GenerationChunk
from fusionserve.loadtest.hostile.kinds import KINDS
from fusionserve.loadtest.hostile.target import Target
from fusionserve.loadtest.serving import server_process
from fusionserve.loadtest.soak.requests import Tokens

_PROMPT = "sub new {"
_HEALTHY: GenerateOptions = {
    "adapter": "perl",  # a share of its own: a crowd under the base is refused for its own flood
    "temperature": 0.8,
    "seed": 5,
    "max_new_tokens": 120,
    "ignore_eos": True,
}
_ALONE_STREAMS = 5
_BESIDE_S = 5.0
_START_S = 0.5  # of its process


class HealthyStreams:
    """One stream after the other; their gaps and how many were not as `expected`."""

    def __init__(self, client: AsyncClient, expected: Tokens) -> None:
        self._client = client
        self._expected = expected
        self.gaps_s: list[float] = []
        self.num_mismatches = 0

    async def run(self) -> Tokens:
        """One more stream."""
        tokens: list[int] = []
        times_s: list[float] = []
        async with self._client.stream(_PROMPT, **_HEALTHY) as events:
            async for event in events:
                if isinstance(event, GenerationChunk) and event.token_ids:
                    times_s.append(time.monotonic())
                    tokens += event.token_ids
        self.gaps_s += [later - earlier for earlier, later in pairwise(times_s)]
        self.num_mismatches += tuple(tokens) != self._expected
        return tuple(tokens)


def main() -> int:
    """Serves, measures, prints a line per kind; 1 if a stream had other tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    arguments = parser.parse_args()
    with server_process({"--dtype": "float32", "--log-level": "warning"}) as server:
        target = Target(grpc=server.grpc, metrics=server.metrics)
        return asyncio.run(_measure(target, arguments.kinds))


async def _measure(target: Target, kinds: Sequence[str]) -> int:
    print(
        f"{'hostile client':24}{'alone ms':>9}{'beside ms':>10}{'ratio':>7}{'streams':>9}{'mismatches':>12}"
    )
    num_mismatches = 0
    async with AsyncClient(target.grpc) as client:
        expected = await HealthyStreams(client, ()).run()
        for kind in tqdm(kinds, leave=False, disable=None):
            alone, beside = HealthyStreams(client, expected), HealthyStreams(client, expected)
            for _ in range(_ALONE_STREAMS):
                await alone.run()
            num_streams = await _run_beside(kind, target, beside)
            _print(kind, alone, beside, num_streams)
            num_mismatches += beside.num_mismatches + alone.num_mismatches
    return 1 if num_mismatches else 0


async def _run_beside(kind: str, target: Target, streams: HealthyStreams) -> int:
    """Streams until the hostile client has gone; returns how many."""
    hostile = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "fusionserve.loadtest.hostile", kind, target.grpc, target.metrics),
        *("--seconds", str(_BESIDE_S)),
    )
    await asyncio.sleep(_START_S)
    num_streams = 0
    while hostile.returncode is None:
        await streams.run()
        num_streams += 1
    assert hostile.returncode == 0, f"{kind} failed"
    return num_streams


def _print(kind: str, alone: HealthyStreams, beside: HealthyStreams, num_streams: int) -> None:
    before_ms, beside_ms = (statistics.median(streams.gaps_s) * 1000 for streams in (alone, beside))
    print(
        f"{kind:24}{before_ms:9.2f}{beside_ms:10.2f}{beside_ms / before_ms:7.2f}"
        f"{num_streams:9}{beside.num_mismatches + alone.num_mismatches:12}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
