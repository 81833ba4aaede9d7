"""What a server holds, sampled again and again: from the kernel, and from its own metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field

import psutil

from fusionserve.loadtest.metrics_page import read_metrics, total
from fusionserve.loadtest.soak.record import SoakRecord

EVERY_S = 1.0
_MEBIBYTE = 1 << 20
RSS, HEAP, FILES, THREADS = "RSS MiB", "heap in use MiB", "files", "threads"
TASKS, LAG = "tasks", "loop lag ms"
BLOCKS, ROWS, LEASES, FUSION_LEASES = "KV blocks", "pool rows held", "adapter leases", "fusion leases"
RUNNING, QUEUED, OPEN = "running", "queued", "open calls"
# What must be nothing once nobody is there and nothing is loaded.
RETURNED = (BLOCKS, ROWS, LEASES, FUSION_LEASES, RUNNING, QUEUED, OPEN)
_GAUGES = {
    TASKS: "event_loop_tasks",
    BLOCKS: "kv_blocks_used",
    ROWS: "adapter_pool_ranks_held",
    LEASES: "adapter_leases",
    FUSION_LEASES: "fusion_leases",
    RUNNING: "requests_running",
    QUEUED: "requests_queued",
}
_INFERENCE = 'grpc_service="fusionserve.v1.InferenceService"'

Sample = Mapping[str, float]


@dataclass(slots=True)
class Samples:
    """All samples of a soak; `columns[name][n]` was measured at `times_s[n]`."""

    times_s: list[float] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)

    def add(self, time_s: float, sample: Sample) -> None:
        """One more."""
        self.times_s.append(time_s)
        for name, value in sample.items():
            self.columns.setdefault(name, []).append(value)


NO_SAMPLE = "sample that could not be taken"


async def take_sample(process: psutil.Process, metrics: str) -> Sample:
    """What the server holds now."""
    page = await read_metrics(metrics)
    with process.oneshot():
        kernel: dict[str, float] = {
            RSS: process.memory_info().rss / _MEBIBYTE,
            FILES: process.num_fds(),
            THREADS: process.num_threads(),
        }
    started = total(page, "grpc_server_started_total", _INFERENCE)
    handled = total(page, "grpc_server_handled_total", _INFERENCE)
    return {
        **kernel,
        HEAP: page.get("fusionserve_heap_used_bytes", 0.0) / _MEBIBYTE,  # only glibc tells
        LAG: page["fusionserve_event_loop_lag_seconds"] * 1000,
        **{name: page[f"fusionserve_{gauge}"] for name, gauge in _GAUGES.items()},
        OPEN: started - handled,
    }


async def keep_sampling(process: psutil.Process, metrics: str, samples: Samples, record: SoakRecord) -> None:
    """Adds a sample every EVERY_S until it is cancelled."""
    while True:
        try:
            samples.add(record.now_s, await take_sample(process, metrics))
        except (OSError, psutil.Error) as error:
            record.note_problem(NO_SAMPLE, repr(error))
        await asyncio.sleep(EVERY_S)


async def wait_returned(process: psutil.Process, metrics: str, within_s: float) -> Sample:
    """A sample from soon after everything is returned, or else after the time."""
    for _ in range(round(within_s / EVERY_S)):
        sample = await take_sample(process, metrics)
        if not any(sample[name] for name in RETURNED):
            break
        await asyncio.sleep(EVERY_S)
    await asyncio.sleep(2 * EVERY_S)  # until the server has counted its tasks anew
    return await take_sample(process, metrics)
