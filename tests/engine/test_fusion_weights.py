"""The fusion weights that a request asks for: those of the unfolded attention, token by token and module by module."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from served_adapters import (
    KV_BLOCK_BYTES,
    TestedEngine,
    begin,
    collect,
    lora,
    make_model,
    make_params,
    make_prompt,
    running_engine,
    until,
    write_dora,
)
from served_fusions import MEMBERS, forget_fusions, fusion, run_unfolded
from torch import Tensor

from fusionserve.generation import (
    Adaptation,
    FusionWeightDetail,
    FusionWeights,
    GenerateParams,
    GenerationChunk,
    GenerationFinished,
    OutputOptions,
    SamplingParams,
)

pytestmark = pytest.mark.gpu

PER_TOKEN, PER_MODULE = FusionWeightDetail.PER_TOKEN, FusionWeightDetail.PER_MODULE
PROMPT = make_prompt(2, 40)  # two full blocks and a half, and two chunks


@pytest.fixture
def engine(fusion_engine: TestedEngine) -> TestedEngine:
    return fusion_engine


def asking(
    name: str,
    detail: FusionWeightDetail = PER_TOKEN,
    *,
    prompt: tuple[int, ...] = PROMPT,
    num_tokens: int = 12,
    request_id: str = "asking",
) -> GenerateParams:
    """A request for the weights of fusion `name`."""
    output = OutputOptions(fusion_weights=detail)
    return make_params(request_id, fusion(name), prompt, output=output, num_tokens=num_tokens)


def weights_of(finished: GenerationFinished) -> FusionWeights:
    """The report, which was asked for."""
    assert finished.fusion_weights is not None
    return finished.fusion_weights


def rows_of(weights: FusionWeights) -> Tensor:
    """[tokens or attentions, members (+ 1)]."""
    return torch.tensor([row.weights for row in weights.tokens or weights.modules])


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def assert_same(finished: GenerationFinished, alone: GenerationFinished) -> None:
    """Tokens and weights are those that the request gets alone."""
    assert finished.candidates[0].token_ids == alone.candidates[0].token_ids
    found, expected = weights_of(finished), weights_of(alone)
    assert found.members == expected.members
    assert [row.position for row in found.tokens] == [row.position for row in expected.tokens]
    assert [row.module for row in found.modules] == [row.module for row in expected.modules]
    assert_near(rows_of(found), rows_of(expected))
    assert_near(torch.tensor(found.mean), torch.tensor(expected.mean))


async def finish_together(engine: TestedEngine, *asked: GenerateParams) -> list[GenerationFinished]:
    """Runs requests that are in the queue together before any is computed."""
    with engine.runner.paused():
        streams = await begin(engine, *asked)
    return [await stream.task for stream in streams]


@pytest.mark.parametrize(
    ("name", "columns", "num_modules"), [("mix", MEMBERS, 2), ("duo", (*MEMBERS[:2], "base"), 4)]
)
async def test_weights_are_those_of_the_unfolded_model(
    engine: TestedEngine, adapters: Path, fusions: Path, name: str, columns: tuple[str, ...], num_modules: int
) -> None:
    outcome = await collect(engine, asking(name))
    per_token = weights_of(outcome.finished)
    per_module = weights_of((await collect(engine, asking(name, PER_MODULE))).finished)
    tokens = (*PROMPT, *outcome.tokens[:-1])  # nothing is computed from the last one
    expected = run_unfolded(make_model("llama"), adapters, fusions / name, tokens).weights
    by_module = torch.stack(list(expected.values()))  # [attentions, tokens, members (+ 1)]
    assert per_token.members == per_module.members == columns
    assert [row.position for row in per_token.tokens] == list(range(len(tokens)))
    assert_near(rows_of(per_token), by_module.mean(dim=0))
    assert len(per_module.modules) == num_modules
    assert [row.module for row in per_module.modules] == list(expected)
    assert_near(rows_of(per_module), by_module.mean(dim=1))
    for weights in (per_token, per_module):
        assert_near(torch.tensor(weights.mean), by_module.mean(dim=(0, 1)))


async def test_fusions_in_one_batch_weigh_as_alone(engine: TestedEngine) -> None:
    asked = [
        asking(name, detail, prompt=make_prompt(n, 9 + 14 * n), request_id=str(n))
        for n, (name, detail) in enumerate((("mix", PER_TOKEN), ("duo", PER_TOKEN), ("mix", PER_MODULE)))
    ]
    alone = [(await collect(engine, params)).finished for params in asked]
    for finished, expected in zip(await finish_together(engine, *asked), alone, strict=True):
        assert_same(finished, expected)


async def test_weights_are_of_their_tokens_also_after_a_step_beside_dora(
    model: Path, adapters: Path, fusions: Path
) -> None:
    """Such a step goes layer by layer, and the ones before and after it in one call."""
    write_dora(adapters / "dora", seed=7)
    asked = asking("mix", num_tokens=30)
    before = make_params("before", Adaptation(), (5,), num_tokens=5)
    dora, behind = (
        make_params(name, kind, (7,), num_tokens=n)
        for name, kind, n in (("dora", lora("dora"), 5), ("behind", Adaptation(), 15))
    )
    options = {"fusion_dirs": (fusions,), "adapter_pool_ranks": 96, "max_batch_requests": 2}
    async with running_engine(model, adapters, **options) as engine:
        alone = await collect(engine, asked)
        await collect(engine, dora)
        with engine.runner.paused():
            tasks = []
            for params in (asked, before, dora, behind):
                tasks.append(asyncio.create_task(collect(engine, params)))
                await until(lambda: len(engine._streams) == len(tasks))
        among, *_ = await asyncio.gather(*tasks)
        await engine.unload_fusion("mix", force=False)
    assert_same(among.finished, alone.finished)


async def test_prompt_is_not_taken_from_the_prefix_cache(engine: TestedEngine) -> None:
    alone = (await collect(engine, asking("mix"))).finished
    silent = replace(asking("mix"), output=OutputOptions())
    assert (await collect(engine, silent)).finished.usage.cached_tokens == 32
    again = (await collect(engine, asking("mix"))).finished
    assert again.usage.cached_tokens == 0
    assert_same(again, alone)


async def test_weights_of_the_prompt_come_with_the_first_chunk(engine: TestedEngine) -> None:
    outcome = await collect(engine, asking("mix"))
    chunks = [event for event in outcome.events if isinstance(event, GenerationChunk)]
    assert [row.position for row in chunks[0].fusion_weights[: len(PROMPT)]] == list(range(len(PROMPT)))
    told = tuple(row for chunk in chunks for row in chunk.fusion_weights)
    assert told == weights_of(outcome.finished).tokens


async def test_weights_are_of_the_first_candidate(engine: TestedEngine) -> None:
    one = replace(asking("mix"), sampling=SamplingParams(temperature=1.0, seed=5))
    alone = (await collect(engine, one)).finished
    outcome = await collect(engine, replace(one, num_candidates=3))
    assert len({candidate.token_ids for candidate in outcome.finished.candidates}) == 3
    assert_same(outcome.finished, alone)
    chunks = [event for event in outcome.events if isinstance(event, GenerationChunk)]
    assert {chunk.candidate_index for chunk in chunks if chunk.fusion_weights} == {0}


@pytest.mark.parametrize("detail", [PER_TOKEN, PER_MODULE])
async def test_weights_that_are_computed_again_after_a_preemption_count_once(
    model: Path, adapters: Path, fusions: Path, detail: FusionWeightDetail
) -> None:
    asked = [
        asking(name, detail, prompt=make_prompt(n, 40), num_tokens=40, request_id=str(n))
        for n, name in enumerate(("mix", "duo", "mix"))
    ]
    options = {"fusion_dirs": (fusions,), "adapter_pool_ranks": 96, "max_context_tokens": 160}
    options["kv_cache_bytes"] = 10 * KV_BLOCK_BYTES
    async with running_engine(model, adapters, **options) as engine:
        alone = [(await collect(engine, params)).finished for params in asked]
        assert engine.engine.scheduler.num_preemptions == 0
        together = await finish_together(engine, *asked)
        assert engine.engine.scheduler.num_preemptions > 0
        for finished, expected in zip(together, alone, strict=True):
            assert_same(finished, expected)
        await forget_fusions(engine)
