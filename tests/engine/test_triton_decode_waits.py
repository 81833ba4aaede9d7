"""No step that is launched ahead waits for a GPU: torch is told to raise where it would."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from pathlib import Path

import pytest
from device_kernels import DEVICE, serve_in_triton
from served_adapters import (
    TestedEngine,
    collect,
    lora,
    make_params,
    make_prompt,
    running_engine,
    until,
    write_lora,
    write_model,
)
from served_fusions import write_fusion

from fusionserve.engine.launched_step import LaunchedStep
from fusionserve.engine.scheduled_batch import ScheduledBatch
from fusionserve.generation import Adaptation, FusionWeightDetail, OutputOptions, SamplingParams
from fusionserve.kernels.device_waits import refusing_waits

pytestmark = pytest.mark.gpu

MEMBERS = ("ada", "bea")
NUM_TOKENS = 24 if DEVICE.type == "cuda" else 14  # on a GPU few residents are copied ahead at a time
REPORT = OutputOptions(fusion_weights=FusionWeightDetail.PER_TOKEN)


class RefusingRunner:
    """Launches with waits refused, but for the first steps, which record their graphs on a GPU."""

    def __init__(self, engine: TestedEngine) -> None:
        self._runner = engine.runner._runner
        self.num_launched = 0
        self.errors: list[Exception] = []
        self.refuses = False
        engine.runner._runner = self

    def execute(self, batch: ScheduledBatch) -> object:
        return self._runner.execute(batch)

    def launch(self, batch: ScheduledBatch, before: LaunchedStep | None) -> LaunchedStep:
        if not self.refuses or before is None:
            return self._runner.launch(batch, before)
        self.num_launched += 1
        try:
            with refusing_waits() if DEVICE.type == "cuda" else nullcontext():
                return self._runner.launch(batch, before)
        except Exception as error:
            self.errors.append(error)
            raise


async def test_steps_launched_ahead_wait_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    for seed, name in enumerate(MEMBERS):
        write_lora(tmp_path / "adapters" / name, seed=seed, rank=8)
    write_fusion(tmp_path / "fusions", "mix", MEMBERS, tmp_path / "adapters", seed=1)
    serve_in_triton(monkeypatch)
    options = {"device": DEVICE.type, "fusion_dirs": (tmp_path / "fusions",), "max_batch_tokens": 160}
    async with running_engine(tmp_path / "model", tmp_path / "adapters", **options) as engine:
        engine.runner.runs_ahead = True
        runner = RefusingRunner(engine)
        if DEVICE.type == "cuda":
            await decode_together(engine)
        runner.refuses = True
        await decode_together(engine)
        await engine.unload_fusion("mix", force=False)
    assert not runner.errors and runner.num_launched >= 10


async def decode_together(engine: TestedEngine) -> None:
    """The base, drawn and greedy, an adapter and a fusion, side by side."""
    kinds = [Adaptation(), Adaptation(), lora("ada"), Adaptation("fusion", fusion="mix")]
    drawn = SamplingParams(temperature=0.8, top_p=0.9, seed=5)
    asked = [
        make_params(f"r{i}", kind, make_prompt(i), num_tokens=NUM_TOKENS, output=REPORT, sampling=sampling)
        for i, (kind, sampling) in enumerate(
            zip(kinds, (drawn, *[SamplingParams(temperature=0.0)] * 3), strict=True)
        )
    ]
    with engine.runner.paused():
        tasks = [asyncio.create_task(collect(engine, params)) for params in asked]
        await until(lambda: len(engine._streams) == len(asked))
    await asyncio.gather(*tasks)
