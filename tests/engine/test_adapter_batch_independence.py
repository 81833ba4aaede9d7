"""A request gives the same tokens alone and in a crowd: other adapters, a full pool, preemption, reloads."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served_adapters import (
    GREEDY,
    KV_BLOCK_BYTES,
    TestedEngine,
    blend,
    collect,
    collect_all,
    lora,
    make_params,
    make_prompt,
    running_engine,
    until,
    write_dora,
    write_lora,
)

from fusionserve import metrics
from fusionserve.generation import Adaptation, GenerateParams, OutputOptions, SamplingParams
from fusionserve.kernels.native_library import native_library

pytestmark = pytest.mark.gpu

RANKS = {"a": 4, "b": 8, "c": 1, "d": 16}
SEEDED = SamplingParams(temperature=0.9, top_p=0.95, repetition_penalty=1.2, seed=1234)
CROWD = [
    Adaptation(),
    *(lora(name) for name in RANKS),
    lora("b", -0.5),
    blend(a=0.5, d=0.5),
    blend(a=1.0, b=-0.3, c=0.7),
    blend(d=0.4, c=0.6),
    Adaptation(),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items(), start=1):
        write_lora(path / name, seed=seed, rank=rank)
    return path


@pytest.fixture(scope="module")
def expected(model: Path, root: Path) -> dict[str, tuple[int, ...]]:
    """Each request's tokens on an engine that never runs two at once and caches nothing."""

    async def run() -> dict[str, tuple[int, ...]]:
        async with running_engine(model, root, max_batch_requests=1, enable_prefix_cache=False) as engine:
            return {params.request_id: (await collect(engine, params)).tokens for params in requests()}

    return asyncio.run(run())


def requests() -> list[GenerateParams]:
    """The crowd, greedy and seeded, with prompts of different lengths; some prompts are shared."""
    return [
        make_params(
            f"{kind}-{i}", adaptation, make_prompt(i % 4, 6 + 11 * (i % 4)), num_tokens=24, sampling=s
        )
        for kind, s in (("greedy", GREEDY), ("seeded", SEEDED))
        for i, adaptation in enumerate(CROWD)
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
async def test_dora_beside_a_request_leaves_its_bits(model: Path, tmp_path: Path, dtype: str) -> None:
    write_dora(tmp_path / "dora", seed=1)
    asked = make_params(
        "asked", Adaptation(), make_prompt(1), num_tokens=12, output=OutputOptions(logprobs=0)
    )
    neighbour = make_params("dora", lora("dora"), make_prompt(2), num_tokens=12)
    async with running_engine(model, tmp_path, dtype=dtype, enable_prefix_cache=False) as engine:
        alone = await collect(engine, asked)
        await collect(engine, neighbour)
        with engine.runner.paused():
            both = asyncio.gather(*(collect(engine, params) for params in (asked, neighbour)))
            await until(lambda: len(engine._streams) == 2)
        beside, _ = await both
    found, expected = (outcome.finished.candidates[0].logprobs for outcome in (beside, alone))
    if torch.cuda.is_available() or native_library() is None:  # libraries multiply one row otherwise than two
        allowed = 1e-4 if dtype == "float32" else 0.05
        assert [each.chosen.logprob for each in found] == pytest.approx(
            [each.chosen.logprob for each in expected], abs=allowed
        )
    else:
        assert found == expected


async def crowd_tokens(engine: TestedEngine) -> dict[str, tuple[int, ...]]:
    asked = requests()
    outcomes = await collect_all(engine, asked)
    return {params.request_id: o.tokens for params, o in zip(asked, outcomes, strict=True)}


def test_crowd_is_diverse(expected: dict[str, tuple[int, ...]]) -> None:
    """Else the other tests would show little: no two requests of the crowd say the same."""
    assert len(set(expected.values())) == len(expected)


@pytest.mark.parametrize("max_batch_tokens", [7, 32, 512])
async def test_crowd_equals_alone(
    model: Path, root: Path, expected: dict[str, tuple[int, ...]], max_batch_tokens: int
) -> None:
    async with running_engine(model, root, max_batch_tokens=max_batch_tokens) as engine:
        assert await crowd_tokens(engine) == expected
        assert await crowd_tokens(engine) == expected  # with the prefix cache warm


async def test_crowd_equals_alone_under_preemption(
    model: Path, root: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    tiny = {"max_context_tokens": 64, "kv_cache_bytes": KV_BLOCK_BYTES * 6, "block_size": 16}
    async with running_engine(model, root, max_batch_tokens=48, **tiny) as engine:
        assert await crowd_tokens(engine) == expected
        assert engine.engine.scheduler.num_preemptions > 0


async def test_crowd_equals_alone_on_a_pool_too_small_for_all(
    model: Path, root: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    """20 rank rows for adapters of 29: requests wait, adapters are evicted, moved together and written again."""
    evictions = metrics.ADAPTER_EVICTIONS.labels("device")._value
    before = evictions.get()
    async with running_engine(model, root, adapter_pool_ranks=20, max_batch_tokens=64) as engine:
        for _ in range(2):
            assert await crowd_tokens(engine) == expected
        assert engine.ledger.num_used <= 20
    assert evictions.get() > before


async def test_crowd_equals_alone_while_adapters_reload(
    model: Path, root: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    """The same weights come again and again, each time as a new version with rows of its own."""
    async with running_engine(model, root, adapter_pool_ranks=40, max_batch_tokens=40) as engine:
        crowd = asyncio.create_task(crowd_tokens(engine))
        num_reloads = 0
        while not crowd.done():
            await engine.load_adapter("abcd"[num_reloads % 4], None, pin=False, replace=True)
            num_reloads += 1
        assert await crowd == expected
        assert num_reloads > 1


async def test_seed_and_not_company_decides_a_sample(model: Path, root: Path) -> None:
    async with running_engine(model, root) as engine:
        params = make_params("one", lora("a"), num_tokens=24, sampling=SEEDED)
        other = replace(params, request_id="two", sampling=replace(SEEDED, seed=1235))
        first, second = await collect_all(engine, [params, other])
        assert first.tokens != second.tokens
        assert (await collect(engine, replace(params, request_id="three"))).tokens == first.tokens
