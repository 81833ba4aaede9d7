"""Rounds on the engine in this process: all streams at once, as the server's own event loop drives it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.engine.base_model import adapt_model
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.generation import Adaptation
from fusionserve.loadtest.bench.drivers.engine_stream import request_params, run_stream
from fusionserve.loadtest.bench.drivers.streams import run_streams
from fusionserve.loadtest.bench.protocol import Outcome
from fusionserve.loadtest.gpu.workload import Case, GpuWorkload
from fusionserve.loadtest.model_shapes import make_model
from fusionserve.metrics import AdapterLabels

_NUM_LABELS = 32


@dataclass(frozen=True, slots=True)
class Round:
    """A round twice over: prompts nobody has seen, then the same from the prefix cache, so that it only decodes."""

    round_s: float  # of the first
    step_s: float  # of a decoding step with all streams, of the second

    @classmethod
    def of(cls, fresh: Outcome, cached: Outcome, num_steps: int) -> Round:
        """Of both and the steps that the second decodes."""
        assert cached.prompt_s is not None
        return cls(fresh.total_s, (cached.total_s - cached.prompt_s) / num_steps)


class EngineRounds:
    """An engine over a random model on the device, held as `quantize` says, until closed."""

    def __init__(
        self, workload: GpuWorkload, folder: Path, device: torch.device, quantize: str = "none"
    ) -> None:
        self._workload = workload
        config = replace(workload.engine_config(folder, device.type), quantize=quantize)
        base = adapt_model(make_model(workload.shape, device), config, Tokenizer(None))
        self._engine = AsyncEngine(config, base, AdapterLabels(_NUM_LABELS))
        self._request_ids = itertools.count()
        self._loop = asyncio.Runner()
        self._loop.run(self._engine.start())

    def run(self, case: Case, label: str) -> Round:
        """A round of all streams with the prompts of the label."""
        return self._round(case, self._workload.prompts(label))

    def run_alone(self, label: str) -> Round:
        """A round of one stream on the base."""
        return self._round(Case(name="base"), self._workload.prompts(label)[:1])

    def _round(self, case: Case, prompts: Sequence[list[int]]) -> Round:
        new_tokens = self._workload.new_tokens
        adaptations = [case.adaptation(stream) for stream in range(len(prompts))]
        fresh, cached = (self._run(prompts, adaptations, new_tokens) for _ in range(2))
        return Round.of(fresh, cached, new_tokens - 1)

    def read_prompt(self, label: str) -> float:
        """Seconds until the first token of one long prompt."""
        return self._run(self._workload.long_prompts(label), [Adaptation()], 1).total_s

    def close(self) -> None:
        """Stops the engine thread."""
        self._loop.run(self._engine.close())
        self._loop.close()

    def _run(
        self, prompts: Sequence[list[int]], adaptations: Sequence[Adaptation], new_tokens: int
    ) -> Outcome:
        requests = [
            request_params(str(next(self._request_ids)), prompt, adaptation, new_tokens)
            for prompt, adaptation in zip(prompts, adaptations, strict=True)
        ]
        return self._loop.run(run_streams(run_stream(self._engine, request) for request in requests))
