"""The live line of a load test: how far it is, and how the server does at present."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AbstractAsyncContextManager

from tqdm import tqdm

from fusionserve.loadtest.background_task import background_task
from fusionserve.loadtest.latency import Spread
from fusionserve.loadtest.load_run import LoadRun
from fusionserve.loadtest_config import LoadConfig

INTERVAL_S = 0.25
_RECENT = 200  # ended requests that the line's TTFT is over
_RATE_S = 3.0  # that tokens/s are over
_BY_TIME = "{desc:9}{percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f} s{postfix}"
_BY_NUMBER = "{desc:9}{percentage:3.0f}%|{bar:20}| {n:.0f}/{total:.0f}{postfix}"


def shown_progress(run: LoadRun, config: LoadConfig) -> AbstractAsyncContextManager[None]:
    """Shows the line on standard error while the block runs, if that is a terminal."""
    return background_task(_show(run, config))


async def _show(run: LoadRun, config: LoadConfig) -> None:
    total = config.num_requests or config.duration_s
    form = _BY_TIME if config.num_requests is None else _BY_NUMBER
    with tqdm(total=total, bar_format=form, disable=None, file=sys.stderr, leave=False) as bar:
        while True:
            bar.set_description_str("measuring" if run.measured_s else "warm-up", refresh=False)
            done = run.num_ended if config.num_requests is not None else run.measured_s
            bar.n = min(done, total or done)
            bar.set_postfix_str(describe(run), refresh=False)
            bar.refresh()
            await asyncio.sleep(INTERVAL_S)


def describe(run: LoadRun) -> str:
    """Requests in flight, recent tokens/s and TTFT, and what failed, in a few words."""
    recent = list(run.ended)[-_RECENT:]
    spread = Spread.of(record.ttft_s for record in recent)
    words = [f"{run.num_in_flight} in flight"]
    if spread is not None:
        words += [f"{_tokens_per_s(run):.0f} tokens/s", f"TTFT p50 {spread.p50 * 1000:.0f} ms"]
    if num_failed := sum(not record.is_ok for record in recent):
        words.append(f"{num_failed} of the last {len(recent)} failed")
    if run.num_not_sent:
        words.append(f"{run.num_not_sent} not sent")
    return ", ".join(words)


def _tokens_per_s(run: LoadRun) -> float:
    """Over the last seconds, of requests in flight as well."""
    now_s = run.clock.now_s()
    since_s = max(0.0, now_s - _RATE_S)
    records = (*run.ended, *run.in_flight.values())
    num_tokens = sum(number for record in records for time_s, number in record.chunks if time_s >= since_s)
    return num_tokens / max(now_s - since_s, 1e-3)
