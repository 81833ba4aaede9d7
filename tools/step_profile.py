"""Where the time of a decoding step goes: layers, LM head, what else the model computes, and what surrounds it.

    python -P tools/step_profile.py [--streams 16] [--context 128] [--new-tokens 64] [--quantize int8]
        [--temperature 0.7] [--top-p 0.9]
    FUSIONSERVE_NATIVE=off python -P tools/step_profile.py

Random weights of a real shape in bfloat16, in process. Medians over the decoding steps of one batch, in milliseconds,
and the floor of such a step, as the machine was before and after: what it needs to read weights, keys and values
(`loadtest/bench/floor.py`). Only steps in which all streams decode count, so new tokens must be many where prompts are
long.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: as the server sets it

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch

from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.decoder_layer import DecoderLayer
from fusionserve.garbage import spare_from_collection
from fusionserve.generation import GenerateParams, SamplingParams, StoppingCriteria, TokenPrompt
from fusionserve.kernels.native_layer import NativeLayers
from fusionserve.loadtest.bench.floor import Load, MachineLimit, step_s
from fusionserve.loadtest.bench.machine import measure_limit
from fusionserve.loadtest.bench.workloads import model_size
from fusionserve.loadtest.model_shapes import SHAPES, save_checkpoint
from fusionserve.metrics import AdapterLabels

_WARM_UP_ROUNDS = 2


class Stopwatch:
    """Sums the time spent in functions, step by step."""

    def __init__(self) -> None:
        self._now: Counter[str] = Counter()
        self.steps: list[Counter[str]] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its time added to `name`."""

        def run(*arguments: Any, **options: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._now[name] += time.perf_counter() - start_s  # type: ignore[assignment]

        return run

    def end_step(self) -> None:
        """What was summed so far was one step."""
        self.steps.append(self._now)
        self._now = Counter()


def main() -> None:
    """Prints the shares and the speed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=sorted(SHAPES), default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--context", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--quantize", choices=("none", "int8", "int4", "nf4"), default="none")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(arguments.shape, Path(folder))
        asyncio.run(_profile(Path(folder), arguments))


async def _profile(model: Path, arguments: argparse.Namespace) -> None:
    config = EngineConfig(model=str(model), model_name="m", dtype="bfloat16", quantize=arguments.quantize)
    engine = AsyncEngine.load(config, AdapterLabels(1))
    watch = Stopwatch()
    _watch(engine, watch, arguments.streams)
    await engine.start()
    spare_from_collection()
    try:
        for number in range(_WARM_UP_ROUNDS):
            await _round(engine, arguments, number)
        watch.steps.clear()
        before = measure_limit(torch.get_num_threads())
        start_s = time.perf_counter()
        await _round(engine, arguments, _WARM_UP_ROUNDS)
        elapsed_s = time.perf_counter() - start_s
        limits = before, measure_limit(torch.get_num_threads())
    finally:
        await engine.close()
    decoding = _decoding(watch)
    _print(decoding, arguments.streams * arguments.new_tokens / elapsed_s)
    if arguments.quantize == "none":
        _print_floor(decoding, arguments, limits)


def _watch(engine: AsyncEngine, watch: Stopwatch, num_streams: int) -> None:
    """Wraps the parts of a step; only steps of one token per stream are kept."""
    base, inner = engine._base, engine.engine
    NativeLayers.compute_ = watch.timed("decoder layers", NativeLayers.compute_)  # type: ignore[method-assign]
    DecoderLayer.compute = watch.timed("decoder layers", DecoderLayer.compute)  # type: ignore[method-assign]
    head = base.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    head.forward = watch.timed("LM head", head.forward)
    BaseModel.logits = watch.timed("model", BaseModel.logits)  # type: ignore[method-assign]
    execute, step = inner._pipeline.execution._runner.execute, watch.timed("step", inner.step)

    def executed(batch: Any) -> Any:
        watch._now["tokens"] = batch.num_tokens
        watch._now["context"] = sum(chunk.end for chunk in batch.chunks) // max(1, len(batch.chunks))
        return execute(batch)

    def stepped() -> Any:
        result = step()
        watch.end_step()
        return result

    inner._pipeline.execution._runner.execute = executed  # type: ignore[method-assign]
    inner.step = stepped  # type: ignore[method-assign]


async def _round(engine: AsyncEngine, arguments: argparse.Namespace, number: int) -> None:
    await asyncio.gather(*(_stream(engine, arguments, number, n) for n in range(arguments.streams)))


async def _stream(engine: AsyncEngine, arguments: argparse.Namespace, number: int, stream: int) -> None:
    numbers = random.Random(f"{number} {stream}")
    params = GenerateParams(
        request_id=f"{number}-{stream}",
        prompt=TokenPrompt(tuple(numbers.choices(range(1000, 40000), k=arguments.context))),
        sampling=SamplingParams(temperature=arguments.temperature, top_p=arguments.top_p),
        stopping=StoppingCriteria(max_new_tokens=arguments.new_tokens, ignore_eos=True),
    )
    async with aclosing(engine.generate(params)) as events:
        async for _ in events:
            pass


def _decoding(watch: Stopwatch) -> list[Counter[str]]:
    """The steps of as many tokens as most have."""
    most = Counter(step["tokens"] for step in watch.steps).most_common(1)[0][0]
    return [step for step in watch.steps if step["tokens"] == most]


def _print(decoding: list[Counter[str]], tokens_per_s: float) -> None:
    medians = {
        name: statistics.median(step[name] for step in decoding) * 1000
        for name in ("decoder layers", "LM head", "model", "step")
    }
    rest = medians["model"] - medians["decoder layers"] - medians["LM head"]
    around = medians["step"] - medians["model"]
    lines = {"decoder layers": medians["decoder layers"], "LM head": medians["LM head"]}
    lines |= {
        "rest of the model": rest,
        "scheduling, tensors, sampling, text": around,
        "step": medians["step"],
    }
    for name, milliseconds in lines.items():
        print(f"{name:36} {milliseconds:6.2f} ms  {milliseconds / medians['step']:4.0%}")
    print(f"{tokens_per_s:.0f} tokens/s, prompts included; {len(decoding)} steps")


def _print_floor(
    decoding: list[Counter[str]], arguments: argparse.Namespace, limits: Sequence[MachineLimit]
) -> None:
    tokens, context = decoding[0]["tokens"], int(statistics.median(step["context"] for step in decoding))
    load = Load(num_streams=tokens, prompt_tokens=arguments.context, new_tokens=arguments.new_tokens)
    taken_s = statistics.median(step["step"] for step in decoding)
    print(f"floor of a step of {tokens} streams at context {context}:")
    for limit in limits:
        least_s = step_s(model_size(arguments.shape), load, limit, context)
        print(
            f"    {least_s * 1000:.2f} ms, {least_s / taken_s:.2f} of it, at {limit.bytes_per_s / 1e9:.1f} GB/s"
        )


if __name__ == "__main__":
    main()
