"""Hostile clients, one kind after the other, each of them once in every round."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from fusionserve.loadtest.hostile.kinds import KINDS
from fusionserve.loadtest.hostile.target import Target
from fusionserve.loadtest.soak.record import SoakRecord, Visit

FAILED_VISIT = "hostile client"
_PAUSE_S = 0.5
_LONGEST_S = 90.0


async def visit(target: Target, kinds: Sequence[str], record: SoakRecord, draws: random.Random) -> None:
    """Rounds until it is cancelled. A client that fails in its own way is a problem: the server did what it may not."""
    while kinds:
        for kind in draws.sample(kinds, len(kinds)):
            since_s = record.now_s
            try:
                async with asyncio.timeout(_LONGEST_S):
                    await KINDS[kind](target)
            except Exception as error:
                record.note_problem(FAILED_VISIT, f"{kind}: {error!r}")
            record.visits.append(Visit(kind, since_s, record.now_s))
            await asyncio.sleep(_PAUSE_S)
