"""Runs a soak: references first, then everything at once, then rest."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from fusionserve.client import AsyncClient, ClientError
from fusionserve.loadtest.background_task import background_task
from fusionserve.loadtest.hostile.target import Target
from fusionserve.loadtest.serving import Flags, server_process
from fusionserve.loadtest.soak.comings import come_and_go, unload_all
from fusionserve.loadtest.soak.record import SoakRecord
from fusionserve.loadtest.soak.requests import draw_requests, references
from fusionserve.loadtest.soak.samples import (
    NO_SAMPLE,
    RSS,
    Sample,
    Samples,
    keep_sampling,
    take_sample,
    wait_returned,
)
from fusionserve.loadtest.soak.traffic import MISMATCH, Traffic
from fusionserve.loadtest.soak.verdict import EXIT_CODE, LOG_ERROR
from fusionserve.loadtest.soak.visitors import visit

_FLAGS: Flags = {
    "--log-level": "warning",
    "--adapter-pool-ranks": 320,  # the fusion fits beside little else
    "--adapter-host-size": "12MiB",  # of some 16 for all adapters; the fusion keeps 8
    "--kv-cache-size": "16MiB",
    "--max-batch-requests": 16,
    "--max-queued-requests": 32,
}
_REST_WITHIN_S = 60.0
_SHOWN_EVERY_S = 0.5
_BAR = "{desc:6}{percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} s{postfix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakPlan:
    """How long, how much, and by whom."""

    seconds: float
    num_clients: int
    num_requests: int  # distinct ones
    kinds: tuple[str, ...]  # of hostile clients
    seed: int
    dtype: str  # what the server computes in


def soak(plan: SoakPlan, adapters: Path, log: Path) -> tuple[Samples, Sample, Sample, SoakRecord]:
    """The samples, what was held before and at rest, and what happened. What the server logs is in `log`."""
    with (
        log.open("w", encoding="utf-8") as file,
        server_process({**_FLAGS, "--dtype": plan.dtype, "--adapter-dir": adapters}, file) as server,
    ):
        target = Target(grpc=server.grpc, metrics=server.metrics)
        outcome = asyncio.run(_soak(plan, target, psutil.Process(server.process.pid)))
    record = outcome[-1]
    if server.process.returncode != 0:
        record.note_problem(EXIT_CODE, str(server.process.returncode))
    for line in log.read_text(encoding="utf-8").splitlines():
        if " ERROR " in line or " CRITICAL " in line or "Traceback" in line:
            record.note_problem(LOG_ERROR, line)
    return outcome


async def _soak(
    plan: SoakPlan, target: Target, process: psutil.Process
) -> tuple[Samples, Sample, Sample, SoakRecord]:
    draws = random.Random(plan.seed)
    requests = draw_requests(plan.num_requests, draws)
    samples = Samples()
    async with AsyncClient(target.grpc) as client:
        expected = await references(client, requests)
        before = await take_sample(process, target.metrics)
        record = SoakRecord()
        works = (
            keep_sampling(process, target.metrics, samples, record),
            Traffic(client, requests, expected, record).run(plan.num_clients, draws),
            come_and_go(target.grpc, record, random.Random(draws.random())),
            visit(target, plan.kinds, record, random.Random(draws.random())),
        )
        await _run_for(plan.seconds, works, samples, record, process)
        at_rest = before
        try:
            await unload_all(client)
            at_rest = await wait_returned(process, target.metrics, _REST_WITHIN_S)
        except (ClientError, OSError, psutil.Error) as error:  # the report says so, and all that was before
            record.note_problem(NO_SAMPLE, repr(error))
        return samples, before, at_rest, record


async def _run_for(
    seconds: float,
    works: tuple[Coroutine[Any, Any, None], ...],
    samples: Samples,
    record: SoakRecord,
    process: psutil.Process,
) -> None:
    """All `works` at once for so long or as long as the server lives, with a bar on a terminal."""
    async with AsyncExitStack() as stack:
        for work in works:
            await stack.enter_async_context(background_task(work))
        with tqdm(total=seconds, bar_format=_BAR, desc="soak", disable=None, file=sys.stderr) as bar:
            while record.now_s < seconds and _lives(process):
                bar.n = min(record.now_s, seconds)
                bar.set_postfix_str(_describe(samples, record), refresh=False)
                bar.refresh()
                await asyncio.sleep(_SHOWN_EVERY_S)


def _lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _describe(samples: Samples, record: SoakRecord) -> str:
    rss = samples.columns.get(RSS, [0.0])[-1]
    return (
        f"{sum(record.requests.values())} requests, {record.problems[MISMATCH]} mismatches, "
        f"{record.problems.total()} problems, {rss:.0f} MiB"
    )
