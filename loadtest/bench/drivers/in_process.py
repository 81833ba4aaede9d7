"""This server's engine without a server: `AsyncEngine` driven on an event loop of this process."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from pathlib import Path

from fusionserve import __version__
from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.garbage import spare_from_collection
from fusionserve.generation import Adaptation, AdapterTerm, SamplingParams
from fusionserve.loadtest.bench.drivers.engine_stream import request_params, run_stream
from fusionserve.loadtest.bench.drivers.served_files import kv_cache_bytes, pool_ranks
from fusionserve.loadtest.bench.drivers.streams import EndedStream, run_streams
from fusionserve.loadtest.bench.protocol import FUSION, MIXED, Job, Outcome, Setup, answer_jobs
from fusionserve.metrics import AdapterLabels

_NUM_LABELS = 32


class InProcess:
    """The engine with its own thread, as the server runs it. Options: `adapters` (no: a bare engine), `quantize`."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.versions = {"fusionserve": __version__}
        self._request_ids = itertools.count()
        self._loop = asyncio.Runner()
        self._engine = AsyncEngine.load(_config(setup), AdapterLabels(_NUM_LABELS))
        self._loop.run(self._engine.start())
        spare_from_collection()

    def run(self, job: Job) -> Outcome:
        """All streams at once."""
        return self._loop.run(run_streams(self._stream(job, stream) for stream in range(len(job.prompts))))

    def close(self) -> None:
        """Stops the engine thread."""
        self._loop.run(self._engine.close())
        self._loop.close()

    def _stream(self, job: Job, stream: int) -> Coroutine[None, None, EndedStream]:
        adaptation = self._adaptation(job.kind, stream)
        request_id = str(next(self._request_ids))
        sampling = SamplingParams(temperature=job.temperature, top_p=job.top_p, seed=stream)
        params = request_params(request_id, list(job.prompts[stream]), adaptation, job.new_tokens, sampling)
        return run_stream(self._engine, params)

    def _adaptation(self, kind: str, stream: int) -> Adaptation:
        if kind == MIXED:
            name = Path(self._setup.adapters[self._setup.adapter_of(stream)]).name
            return Adaptation(kind="lora", terms=(AdapterTerm(name),))
        if kind == FUSION:
            return Adaptation(kind="fusion", fusion=Path(self._setup.fusion).name)
        return Adaptation()


def _config(setup: Setup) -> EngineConfig:
    has_adapters = setup.options["adapters"] == "yes"
    return EngineConfig(
        model=setup.model,
        model_name="bench",
        dtype="bfloat16",
        quantize=setup.options.get("quantize", "none"),
        adapter_dirs=(Path(setup.adapters[0]).parent,) if has_adapters else (),
        fusion_dirs=(Path(setup.fusion).parent,) if has_adapters else (),
        max_context_tokens=setup.tokens_per_stream + 64,
        kv_cache_bytes=kv_cache_bytes(setup),
        adapter_pool_ranks=pool_ranks(setup),
        allow_base_mismatch=True,
        num_threads=setup.num_threads,
    )


if __name__ == "__main__":
    answer_jobs(InProcess)
