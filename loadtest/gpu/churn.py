"""Many adapters in host memory, a pool for few of them: clients draw theirs by Zipf's law, again and again.

Compared with as many clients on adapters that all fit the pool.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import torch

from fusionserve.adapter_status import Residency
from fusionserve.config import EngineConfig
from fusionserve.engine.async_engine import AsyncEngine
from fusionserve.engine.base_model import adapt_model
from fusionserve.engine.tokenizer import Tokenizer
from fusionserve.generation import Adaptation, AdapterTerm, GenerationChunk
from fusionserve.loadtest.bench.drivers.engine_stream import request_params
from fusionserve.loadtest.gpu.figures import ChurnFigure
from fusionserve.loadtest.latency import Spread
from fusionserve.loadtest.model_shapes import make_model, save_adapter
from fusionserve.metrics import AdapterLabels

_NUM_LABELS = 32
_DISTINCT = 16  # weight files that are made; other adapters are links to them, and read and held all the same
_TOKEN_IDS = range(1000, 40000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChurnWorkload:
    """Clients that send one request after the other."""

    shape: str
    num_adapters: int = 1000
    num_in_pool: int = 64
    rank: int = 8
    num_clients: int = 64
    requests_each: int = 8
    prompt_tokens: int = 128
    new_tokens: int = 32


@dataclass(frozen=True, slots=True)
class _Request:
    is_cold: bool
    asked_s: float
    token_s: list[float]


def measure_churn(
    workload: ChurnWorkload, folder: Path, device: torch.device, tell: Callable[[ChurnFigure], None]
) -> None:
    """A round on adapters that fit the pool, "calm", and one on all of them, "churning"."""
    names = _make_adapters(workload, folder)
    config = _config(workload, folder, device)
    base = adapt_model(make_model(workload.shape, device), config, Tokenizer(None))
    engine = AsyncEngine(config, base, AdapterLabels(_NUM_LABELS))
    with asyncio.Runner() as loop:
        loop.run(_measure(engine, workload, names, tell))


async def _measure(
    engine: AsyncEngine, workload: ChurnWorkload, names: Sequence[str], tell: Callable[[ChurnFigure], None]
) -> None:
    await engine.start()
    for name in names:
        await engine.load_adapter(name, None, pin=False, replace=False)
    few = names[: workload.num_in_pool]
    await _round(engine, workload, few, "warm-up")  # which brings them into the pool
    tell(await _round(engine, workload, few, "calm"))
    tell(await _round(engine, workload, names, "churning"))
    await engine.close()


async def _round(
    engine: AsyncEngine, workload: ChurnWorkload, names: Sequence[str], label: str
) -> ChurnFigure:
    weights = [1 / place for place in range(1, len(names) + 1)]
    numbers = random.Random(len(names))

    async def client(number: int) -> list[_Request]:
        drawn = numbers.choices(names, weights, k=workload.requests_each)
        return [
            await _ask(engine, workload, name, f"{number}-{n}-{time.monotonic_ns()}")
            for n, name in enumerate(drawn)
        ]

    started_s = time.monotonic()
    ended = await asyncio.gather(*(client(number) for number in range(workload.num_clients)))
    requests = [request for each in ended for request in each]
    num_tokens = len(requests) * workload.new_tokens
    warm, cold = ([r for r in requests if r.is_cold == is_cold] for is_cold in (False, True))
    gaps = (later - earlier for r in warm for earlier, later in itertools.pairwise(r.token_s))
    return ChurnFigure(
        round=label,
        tokens_per_s=num_tokens / (time.monotonic() - started_s),
        warm_ttft_s=_p99(request.token_s[0] - request.asked_s for request in warm),
        cold_ttft_s=_p99(request.token_s[0] - request.asked_s for request in cold),
        warm_itl_s=_p99(gaps),
    )


async def _ask(engine: AsyncEngine, workload: ChurnWorkload, name: str, request_id: str) -> _Request:
    status = await engine.get_adapter(name)
    numbers = random.Random(request_id)
    prompt = [numbers.choice(_TOKEN_IDS) for _ in range(workload.prompt_tokens)]
    adaptation = Adaptation("lora", terms=(AdapterTerm(name),))
    asked_s, token_s = time.monotonic(), []
    params = request_params(request_id, prompt, adaptation, workload.new_tokens)
    async with aclosing(engine.generate(params)) as events:
        async for event in events:
            if isinstance(event, GenerationChunk):
                token_s.append(time.monotonic())
    return _Request(status.residency is not Residency.DEVICE, asked_s, token_s)


def _p99(seconds: Iterable[float]) -> float | None:
    spread = Spread.of(seconds)
    return spread.p99 if spread else None


def _make_adapters(workload: ChurnWorkload, folder: Path) -> list[str]:
    names = [f"a{n:04}" for n in range(workload.num_adapters)]
    for n, name in enumerate(names):
        if n < _DISTINCT:
            save_adapter(workload.shape, folder / name, rank=workload.rank, seed=n)
            continue
        (folder / name).mkdir()
        for file in (folder / names[n % _DISTINCT]).iterdir():
            os.link(file, folder / name / file.name)
    return names


def _config(workload: ChurnWorkload, folder: Path, device: torch.device) -> EngineConfig:
    return EngineConfig(
        model=workload.shape,
        model_name=workload.shape,
        device=device.type,
        dtype="bfloat16",
        adapter_dirs=(folder,),
        max_context_tokens=workload.prompt_tokens + workload.new_tokens,
        max_batch_tokens=2048,
        max_batch_requests=workload.num_clients,
        kv_cache_bytes=4 << 30 if device.type == "cuda" else 256 << 20,
        adapter_pool_ranks=workload.num_in_pool * workload.rank,
        adapter_host_bytes=64 << 30,
        allow_base_mismatch=True,
    )
