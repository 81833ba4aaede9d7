"""Sends planned requests in an open or a closed loop and keeps what became of them."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Iterator

from fusionserve.client import AsyncClient
from fusionserve.loadtest.request_plan import PlannedRequest
from fusionserve.loadtest.request_record import RequestRecord
from fusionserve.loadtest.send_request import Clock, send_request
from fusionserve.loadtest_config import LoadConfig

_RECENT = 2000  # ended requests that are kept at hand
PAUSE_AFTER_FAILURE_S = 0.1  # of a closed loop's stream: a server that refuses at once is not stormed


class LoadRun:
    """One run; `records` grows while it lasts, in the order of sending, warm-up included."""

    def __init__(self, client: AsyncClient, config: LoadConfig, plan: Iterator[PlannedRequest]) -> None:
        self._client = client
        self._config = config
        self._plan = plan
        # A run with the seed of an earlier one would find all its prompts in the server's prefix cache.
        self._cache_salt = uuid.uuid4().hex
        self._stop = asyncio.Event()
        self._first_counted_s: float | None = None
        self.clock = Clock()
        self.records: list[RequestRecord] = []
        self.in_flight: dict[int, RequestRecord] = {}  # by index
        self.ended: deque[RequestRecord] = deque(maxlen=_RECENT)  # the last ones
        self.most_in_flight = 0
        self.num_ended = 0  # counted requests
        self.num_not_sent = 0  # counted requests of an open loop that had reached its bound

    @property
    def is_stopped(self) -> bool:
        """True if `stop` ended the run early."""
        return self._stop.is_set()

    @property
    def num_in_flight(self) -> int:
        """Requests that have been sent and have not ended."""
        return len(self.in_flight)

    @property
    def measured_s(self) -> float:
        """Seconds since the first counted request was due; 0 during the warm-up."""
        return 0.0 if self._first_counted_s is None else self.clock.now_s() - self._first_counted_s

    def stop(self) -> None:
        """Sends no more; requests in flight are waited for."""
        self._stop.set()

    async def run(self) -> None:
        """Returns when the last request has ended; a cancelled run cancels its requests."""
        self.clock = Clock()
        async with asyncio.TaskGroup() as group:
            if self._config.rate is not None:
                await self._open_loop(group)
            else:
                for _ in range(self._config.concurrency):
                    group.create_task(self._closed_stream())

    async def _open_loop(self, group: asyncio.TaskGroup) -> None:
        for planned in self._plan:
            due_s = planned.due_s or 0.0
            if self._is_over(planned, due_s) or not await self._wait_until(due_s):
                return
            if self.num_in_flight < self._config.max_in_flight:
                group.create_task(self._send(planned, self._new_record(planned, due_s)))
            else:
                self.num_not_sent += planned.index >= self._config.warm_up

    async def _closed_stream(self) -> None:
        while not self._stop.is_set():
            planned = next(self._plan)
            now_s = self.clock.now_s()
            if self._is_over(planned, now_s):
                return
            record = self._new_record(planned, now_s)
            await self._send(planned, record)
            if not record.is_ok:
                await asyncio.sleep(PAUSE_AFTER_FAILURE_S)

    def _is_over(self, planned: PlannedRequest, now_s: float) -> bool:
        """True if this request is no longer part of the run; the first counted one starts its time."""
        config = self._config
        num_counted = planned.index - config.warm_up
        if num_counted < 0:
            return False
        if self._first_counted_s is None:
            self._first_counted_s = now_s
        if config.num_requests is not None and num_counted >= config.num_requests:
            return True
        return config.duration_s is not None and now_s - self._first_counted_s >= config.duration_s

    async def _wait_until(self, due_s: float) -> bool:
        """False if the run was stopped meanwhile."""
        wait_s = due_s - self.clock.now_s()
        if wait_s <= 0:
            await asyncio.sleep(0)  # a late loop still reads what has arrived
            return not self._stop.is_set()
        try:
            async with asyncio.timeout(wait_s):
                await self._stop.wait()
        except TimeoutError:
            return True
        return False

    def _new_record(self, planned: PlannedRequest, due_s: float) -> RequestRecord:
        record = RequestRecord(
            index=planned.index,
            kind=planned.kind,
            names=planned.names,
            is_counted=planned.index >= self._config.warm_up,
            due_s=due_s,
            sent_s=self.clock.now_s(),
        )
        self.records.append(record)
        self.in_flight[record.index] = record
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        return record

    async def _send(self, planned: PlannedRequest, record: RequestRecord) -> None:
        try:
            await send_request(
                self._client,
                planned,
                record,
                clock=self.clock,
                options=planned.options(self._cache_salt),
                timeout_s=self._config.timeout_s,
            )
        finally:
            self.ended.append(self.in_flight.pop(record.index))
            self.num_ended += record.is_counted
