"""Kills a server again and again, and checks that the next one serves as if nothing had happened.

    python -m fusionserve.loadtest.kill_loop --rounds 200

A round starts a server, puts it under mixed traffic with adapters and fusions coming and going, and ends it: by
SIGKILL while it starts, by SIGKILL at a random moment, or from inside, at a failpoint (`fusionserve/failpoints.py`).
The server after it, on the same folders, must be ready, have nothing loaded, give every reference request the tokens it
had before the first kill, and stop with 0. In every eighth round the cache of compiled kernels is fresh, so that a kill
may meet the compiler.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fusionserve.client import Client, ClientError
from fusionserve.failpoints import EXIT_CODE, VARIABLE
from fusionserve.loadtest.churn import ADAPTERS, FUSION, Churn

_POINTS = (
    "artifact.open",
    "artifact.header",
    "host.publish",
    "host.evict",
    "pool.activate",
    "pool.evict",
    "engine.step",
    "stream.write",
)
_FLAGS = (
    *("--dtype", "float32", "--listen", "127.0.0.1:0", "--metrics-listen", "off", "--log-level", "error"),
    *("--adapter-pool-ranks", "320", "--adapter-host-size", "9MiB"),  # little more than one kind needs
)
_GREEDY = {"temperature": 0.0, "max_new_tokens": 32, "ignore_eos": True}
_SEEDED = {**_GREEDY, "temperature": 0.9, "seed": 11}
_REFERENCES: tuple[dict[str, Any], ...] = (
    _GREEDY,
    *({**_SEEDED, "adapter": name} for name in ADAPTERS),
    {**_SEEDED, "blend": {ADAPTERS[0]: 0.5, ADAPTERS[1]: 0.5}},
    {**_GREEDY, "fusion": FUSION},
)
_PROMPT = "The first line of the file"
_FRESH_CACHE_EVERY = 8
_FAILPOINT_WAIT_S = 20.0

Tokens = list[tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Kill:
    """How one server ends."""

    how: str  # "start", "traffic" or a failpoint
    after: float  # seconds, or passes through the failpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line per kind of kill; 1 if a restart was not clean."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    draws = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        references = _check(cache, None)
        ends: Counter[str] = Counter()
        problems: list[str] = []
        for number in tqdm(range(arguments.rounds), desc="kills", disable=None):
            if number % _FRESH_CACHE_EVERY == _FRESH_CACHE_EVERY - 1:
                cache = Path(folder) / f"cache-{number}"
            kill = _draw(draws)
            ends[f"{kill.how}: {_kill(kill, cache, draws)}"] += 1
            try:
                _check(cache, references)
            except (AssertionError, ClientError) as error:
                problems.append(f"round {number}, {kill}: {error}")
    for how, count in sorted(ends.items()):
        print(f"{count:4d}  {how}")
    print(f"{arguments.rounds - len(problems)} of {arguments.rounds} restarts clean")
    for problem in problems:
        print(f"not clean: {problem}")
    return 1 if problems else 0


def _draw(draws: random.Random) -> Kill:
    match draws.choice(("start", "traffic", "failpoint")):
        case "start":
            return Kill("start", draws.uniform(0, 6))
        case "traffic":
            return Kill("traffic", draws.uniform(0, 1.5))
    return Kill(draws.choice(_POINTS), draws.randrange(24))  # the first ten artifacts are opened as it starts


def _kill(kill: Kill, cache: Path, draws: random.Random) -> str:
    """Starts a server and ends it; returns what it died of."""
    failpoints = f"{kill.how}={int(kill.after)}+exit" if kill.how in _POINTS else ""
    process = _start(cache, failpoints)
    try:
        if kill.how == "start":
            time.sleep(kill.after)
        elif (address := _ready(process)) is not None:
            with Churn(address, seed=draws.randrange(1 << 30)):
                wait_s = _FAILPOINT_WAIT_S if failpoints else kill.after
                _wait(process, wait_s)
    finally:
        process.kill()
        code = process.wait()
        assert process.stdout is not None
        process.stdout.close()
    return {-signal.SIGKILL: "killed", EXIT_CODE: "reached"}.get(code, f"exit code {code}")


def _check(cache: Path, references: Tokens | None) -> Tokens:
    """Starts a server, compares what it serves with `references`, stops it. Raises AssertionError."""
    process = _start(cache, "")
    try:
        address = _ready(process)
        assert address is not None, "the server did not start"
        with Client(address, timeout_s=60) as client:
            states = {adapter.name: adapter.state for adapter in client.adapters.list()}
            assert set(states) == set(ADAPTERS) and set(states.values()) == {"available"}, states
            tokens = [client.generate(_PROMPT, **request).token_ids for request in _REFERENCES]
        assert references is None or tokens == references, "other tokens than before"
        process.terminate()
        code = process.wait(30)
        assert code == 0, f"exit code {code}"
        return tokens
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _start(cache: Path, failpoints: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("fusionserve")), "serve", *_FLAGS]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache), VARIABLE: failpoints}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def _ready(process: subprocess.Popen[str]) -> str | None:
    """The server's address, or None if it has ended before it was ready."""
    assert process.stdout is not None
    words = process.stdout.readline().split()
    return words[1].removeprefix("grpc=") if words else None


def _wait(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return


if __name__ == "__main__":
    sys.exit(main())
