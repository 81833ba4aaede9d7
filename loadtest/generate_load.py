"""Runs a load test: asks the server what it has, plans, sends, and hands back what happened."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime

from fusionserve.client import AsyncClient
from fusionserve.client.server_access import IN_THE_CLEAR, ServerAccess
from fusionserve.loadtest.catalog import read_catalog
from fusionserve.loadtest.load_run import LoadRun
from fusionserve.loadtest.outcome import Outcome
from fusionserve.loadtest.progress import shown_progress
from fusionserve.loadtest.request_plan import plan_requests
from fusionserve.loadtest_config import LoadConfig


async def generate_load(config: LoadConfig, access: ServerAccess = IN_THE_CLEAR) -> Outcome:
    """The outcome of one run. The first interrupt ends it early, with what there is; a second one as usual.

    Raises PreconditionError if the server cannot do what `config` wants, ClientError if it cannot be asked. What
    happens to requests is no error: it is in the outcome.
    """
    async with AsyncClient(
        config.target,
        credentials=access.credentials,
        token=access.token,
        allow_insecure=access.allow_insecure,
    ) as client:
        catalog = await read_catalog(client, config)
        run = LoadRun(client, config, plan_requests(config, catalog))
        started_at, cpu_s = datetime.now(UTC), time.process_time()
        async with shown_progress(run, config), _stopped_by_interrupt(run.stop):
            await run.run()
    return Outcome(
        config=config,
        catalog=catalog,
        records=run.records,
        started_at=started_at,
        num_not_sent=run.num_not_sent,
        most_in_flight=run.most_in_flight,
        client_cpu_s=time.process_time() - cpu_s,
        was_stopped=run.is_stopped,
    )


@contextlib.asynccontextmanager
async def _stopped_by_interrupt(stop: Callable[[], None]) -> AsyncIterator[None]:
    """The first SIGINT within the block calls `stop`; outside the main thread there is no such thing."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    with contextlib.suppress(ValueError, RuntimeError):
        loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError, RuntimeError):
            loop.remove_signal_handler(signal.SIGINT)
