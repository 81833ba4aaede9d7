"""`python -m fusionserve.loadtest.hostile KIND GRPC METRICS`: lets one kind loose on a server, for a while at least."""

from __future__ import annotations

import argparse
import asyncio
import time

from fusionserve.loadtest.hostile.kinds import KINDS
from fusionserve.loadtest.hostile.target import Target


def main() -> None:
    """Again and again until the time is over."""
    parser = argparse.ArgumentParser(prog="hostile", description=__doc__)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("grpc")
    parser.add_argument("metrics")
    parser.add_argument("--seconds", type=float, default=0.0)
    arguments = parser.parse_args()
    target = Target(grpc=arguments.grpc, metrics=arguments.metrics)
    asyncio.run(_let_loose(arguments.kind, target, time.monotonic() + arguments.seconds))


async def _let_loose(kind: str, target: Target, until_s: float) -> None:
    await KINDS[kind](target)
    while time.monotonic() < until_s:
        await KINDS[kind](target)


if __name__ == "__main__":
    main()
