"""The engine over the kernels of a GPU: the tokens and fusion weights that the CPU's give.

Without a GPU Triton interprets the kernels, on CPU tensors; everything around them is what a GPU is served with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delayed_copies import DelayedCopies
from device_kernels import DEVICE, serve_in_triton
from fused_families import assert_weighed_as_unfolded, write_fused
from peft_adapters import randomize, save, wrap
from served_adapters import (
    GREEDY,
    Outcome,
    TestedEngine,
    blend,
    collect,
    collect_all,
    lora,
    make_params,
    make_prompt,
    running_engine,
    until,
    write_lora,
    write_model,
)
from served_fusions import write_fusion
from tiny_models import CONFIGS, make_tiny_model

from fusionserve.engine.decode_graphs import GraphSize
from fusionserve.errors import NotFoundError
from fusionserve.fusion.config import Scope
from fusionserve.generation import (
    Adaptation,
    FusionWeightDetail,
    GenerateParams,
    OutputOptions,
    SamplingParams,
)

pytestmark = pytest.mark.gpu

MEMBERS = ("ada", "bea", "cid")
SEEDED = SamplingParams(temperature=0.8, seed=5)
REPORT = OutputOptions(fusion_weights=FusionWeightDetail.PER_TOKEN, logprobs=2)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A model, adapters of ranks that fill an item, leave room in one and take two, and two fusions of them."""
    write_model(tmp_path / "model")
    for seed, (name, rank) in enumerate(zip(MEMBERS, (3, 16, 20), strict=True)):
        write_lora(tmp_path / "adapters" / name, seed=seed, rank=rank)
    write_fusion(tmp_path / "fusions", "mix", MEMBERS, tmp_path / "adapters", seed=1)
    options = {"scope": Scope.MODULE, "base_member": True}
    write_fusion(tmp_path / "fusions", "duo", MEMBERS[:2], tmp_path / "adapters", seed=2, **options)
    return tmp_path


@asynccontextmanager
async def serving(
    folders: Path, device: str, copies: DelayedCopies | None = None, max_batch_tokens: int = 40
) -> AsyncIterator[TestedEngine]:
    options = {"device": device, "fusion_dirs": (folders / "fusions",), "adapter_pool_ranks": 176}
    options |= {"max_batch_tokens": max_batch_tokens}
    async with running_engine(folders / "model", folders / "adapters", copies, **options) as engine:
        yield engine
        for name in ("mix", "duo"):
            with suppress(NotFoundError):
                await engine.unload_fusion(name, force=False)


async def in_both(
    folders: Path, asked: list[GenerateParams], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Outcome], list[Outcome]]:
    """What a CPU gives and what these kernels give: the same tokens."""
    async with serving(folders, "cpu") as engine:
        expected = await collect_all(engine, asked)
    serve_in_triton(monkeypatch)
    async with serving(folders, DEVICE.type) as engine:
        found = await collect_all(engine, asked)
    assert [outcome.tokens for outcome in found] == [outcome.tokens for outcome in expected]
    return expected, found


def graph_sizes(engine: TestedEngine) -> list[GraphSize]:
    graphs = engine.runner._runner._graphs
    assert graphs is not None
    return list(graphs._graphs)


def requests(output: OutputOptions = REPORT, num_tokens: int = 3) -> list[GenerateParams]:
    kinds = [
        Adaptation(),
        lora("ada"),
        lora("cid", 0.5),
        blend(ada=0.3, bea=0.9),
        Adaptation("fusion", fusion="mix"),
        Adaptation("fusion", fusion="mix", excluded_members=("bea",)),
        Adaptation("fusion", fusion="duo"),
    ]
    return [
        make_params(
            f"r{i}", kind, make_prompt(i, 5 + 2 * i), num_tokens=num_tokens, output=output, sampling=sampling
        )
        for i, (kind, sampling) in enumerate(zip(kinds, [SEEDED, *[GREEDY] * 6], strict=True))
    ]


def weights_of(outcome: Outcome) -> list[float]:
    report = outcome.finished.fusion_weights
    return [] if report is None else [weight for token in report.tokens for weight in token.weights]


async def test_mixed_batch_in_triton_gets_the_tokens_and_weights_of_the_cpu(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(folders, "cpu") as engine:
        expected = await collect_all(engine, requests())
    serve_in_triton(monkeypatch)
    late = None if DEVICE.type == "cuda" else DelayedCopies()  # a GPU has late ones of its own
    async with serving(folders, DEVICE.type, late) as engine:
        found = await collect_all(engine, requests())
        again = await collect(engine, requests()[0])
        sizes = graph_sizes(engine)
    assert any(size.num_fused for size in sizes) and GraphSize(1) in sizes, "decoding steps were not replayed"
    assert again.tokens == found[0].tokens
    assert [outcome.tokens for outcome in found] == [outcome.tokens for outcome in expected]
    assert len({outcome.tokens for outcome in found}) == len(found)
    for ours, theirs in zip(found, expected, strict=True):
        assert weights_of(ours) == pytest.approx(weights_of(theirs), abs=1e-3)
    assert weights_of(found[-1])


@pytest.mark.parametrize("way", ["natively", "in Triton"])
async def test_weights_that_were_not_finite_reach_no_later_step(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules ahead of the first attention have rows of zeros for the fusion, which NaN must not meet."""
    write_model(tmp_path / "model")
    for seed, name in enumerate(MEMBERS):
        write_lora(tmp_path / "adapters" / name, seed=seed)
    modules = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(2))
    write_fusion(tmp_path / "fusions", "mix", MEMBERS, tmp_path / "adapters", seed=1, modules=modules)
    if way == "in Triton":
        serve_in_triton(monkeypatch)
    request = make_params("one", Adaptation("fusion", fusion="mix"), make_prompt(0, 1), num_tokens=4)
    async with serving(tmp_path, DEVICE.type if way == "in Triton" else "cpu") as engine:
        await collect(engine, make_params("rows", lora("ada"), make_prompt(1, 4), num_tokens=2))
        expected = await collect(engine, request)
        assert poison_weights(engine)
        assert (await collect(engine, request)).tokens == expected.tokens


def poison_weights(engine: TestedEngine) -> int:
    """Makes what the next step could take for the fusion weights of a layer before NaN; how many tensors that is."""
    runner = engine.runner._runner
    kept = [segment._coefficients for segment in runner._fused._segments.values()]
    if runner._graphs is not None:
        kept += [graph.items._shares for graph in runner._graphs._graphs.values() if graph.items is not None]
    with torch.inference_mode():
        for weights in kept:
            weights.fill_(float("nan"))
    return len(kept)


async def test_attention_at_the_head_is_no_part_of_the_weights_in_triton_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model")
    for seed, name in enumerate(MEMBERS[:2]):
        write_lora(tmp_path / "adapters" / name, seed=seed, has_head=True)
    write_fusion(tmp_path / "fusions", "mix", MEMBERS[:2], tmp_path / "adapters", seed=1)
    head_only = {"modules": ("lm_head",)}
    write_fusion(tmp_path / "fusions", "duo", MEMBERS[:2], tmp_path / "adapters", seed=2, **head_only)
    asked = [
        make_params(name, Adaptation("fusion", fusion=name), make_prompt(1), num_tokens=2, output=REPORT)
        for name in ("mix", "duo")
    ]
    expected, found = await in_both(tmp_path, asked, monkeypatch)
    for ours, theirs in zip(found, expected, strict=True):
        assert weights_of(ours) == pytest.approx(weights_of(theirs), abs=1e-3)
    assert weights_of(found[0]) and not weights_of(found[1])


async def test_steps_launched_ahead_give_the_tokens_and_weights_of_the_cpu(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough for all to decode together: on a GPU few residents are copied ahead at a time.
    num_tokens = 24 if DEVICE.type == "cuda" else 8
    plain = requests(OutputOptions(fusion_weights=FusionWeightDetail.PER_TOKEN), num_tokens=num_tokens)
    async with serving(folders, "cpu") as engine:
        expected = await collect_all(engine, plain)
    serve_in_triton(monkeypatch)
    stopped = stopping_at(plain[1], expected[1].tokens[2])
    async with serving(folders, DEVICE.type, max_batch_tokens=160) as engine:
        engine.runner.runs_ahead = True
        with engine.runner.paused():
            tasks = [asyncio.create_task(collect(engine, p)) for p in (plain[0], stopped, *plain[2:])]
            await until(lambda: len(engine._streams) == len(plain))
        found = await asyncio.gather(*tasks)
        most = max(engine.runner.sizes_ahead, default=0)
    assert most == len(plain), "they did not decode side by side"
    assert found[1].tokens == expected[1].tokens[: len(found[1].tokens)] and len(found[1].tokens) <= 3
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.tokens == theirs.tokens or index == 1
        assert weights_of(ours) == pytest.approx(weights_of(theirs), abs=1e-3)


async def test_scaled_embedding_is_adapted_in_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma's holds its scale in a tensor, which a kernel would take for an address."""
    config = CONFIGS["gemma3"]()
    config.tie_word_embeddings = False
    model = make_tiny_model(config)
    model.save_pretrained(tmp_path / "model")
    adapter = wrap(model, target_modules=["embed_tokens", "q_proj"], r=4, lora_alpha=4)
    randomize(adapter, seed=1)
    save(adapter, tmp_path / "adapters" / "ada")
    both = [
        make_params(name, kind, make_prompt(0, 7), num_tokens=2)
        for name, kind in (("adapted", lora("ada")), ("base", Adaptation()))
    ]
    expected, _ = await in_both(tmp_path, both, monkeypatch)
    assert expected[0].tokens != expected[1].tokens


# Of the interpreter: 1 / (1 + inf) is meant.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize(("family", "attention_at"), [("gpt_neox", "first"), ("phi", "output")])
async def test_fusion_of_a_parallel_layer_equals_the_unfolded_model(
    family: str, attention_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve_in_triton(monkeypatch)
    write_fused(family, attention_at, tmp_path)
    await assert_weighed_as_unfolded(family, DEVICE.type, tmp_path)


def stopping_at(params: GenerateParams, token_id: int) -> GenerateParams:
    return replace(params, stopping=replace(params.stopping, stop_token_ids=(token_id,)))
