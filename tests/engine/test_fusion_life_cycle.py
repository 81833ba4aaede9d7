"""Fusions loaded, replaced and unloaded while requests use them, and what becomes of their members."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest
from served_adapters import (
    TestedEngine,
    begin,
    collect,
    lora,
    make_params,
    make_prompt,
    running_engine,
    until,
    write_lora,
)
from served_fusions import MEMBERS, forget_fusions, fusion, write_fusion

from fusionserve.adapter_status import AdapterState
from fusionserve.errors import AbortedError, CapacityError, InternalError, PreconditionError
from fusionserve.fusion.fusion import Fusion
from fusionserve.generation import GenerateParams
from fusionserve.metrics import REGISTRY

PROMPT = make_prompt(2, 7)
READY, AVAILABLE = AdapterState.READY, AdapterState.AVAILABLE
MOMENT_S = 0.05  # in which what does not wait would be done


@pytest.fixture
def engine(fusion_engine: TestedEngine) -> TestedEngine:
    return fusion_engine


def long(name: str) -> GenerateParams:
    """A request that is met by other things."""
    return make_params(f"long-{name}", fusion(name), PROMPT, num_tokens=60)


async def mix_tokens(engine: TestedEngine) -> tuple[int, ...]:
    return (await collect(engine, make_params("mix", fusion("mix"), PROMPT))).tokens


async def test_fusion_keeps_its_members_loaded(engine: TestedEngine) -> None:
    status = await engine.load_fusion("mix", None, pin=False, replace=False)
    assert [member.name for member in status.members] == list(MEMBERS)
    held = await engine.get_adapter("ada")
    assert (held.held_by_fusions, held.active_requests) == (("mix",), 0)
    with pytest.raises(PreconditionError) as caught:
        await engine.unload_adapter("ada", force=True)
    assert caught.value.metadata == {"adapter": "ada", "fusions": "mix"}
    await engine.unload_fusion("mix", force=False)
    assert (await engine.unload_adapter("ada", force=False)).state is AdapterState.AVAILABLE


async def test_reloaded_member_counts_the_requests_of_its_own_version(engine: TestedEngine) -> None:
    await engine.load_fusion("mix", None, pin=False, replace=False)
    await engine.load_adapter("ada", None, pin=False, replace=True)  # the fusion holds the version before
    assert (await engine.get_adapter("ada")).active_requests == 0
    with engine.runner.paused():
        (stream,) = await begin(engine, make_params("long-ada", lora("ada"), PROMPT, num_tokens=60))
        assert (await engine.get_adapter("ada")).active_requests == 1
    await stream.task


async def test_listing_asks_once_who_holds_the_adapters(
    engine: TestedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("mix", "duo"):
        await engine.load_fusion(name, None, pin=False, replace=False)
    versions, num_walks = engine._fusions.registry.versions, count()

    def counted() -> list[Fusion]:
        next(num_walks)
        return versions()

    monkeypatch.setattr(engine._fusions.registry, "versions", counted)
    held = {status.name: status.held_by_fusions for status in await engine.list_adapters()}
    assert held == {"ada": ("duo", "mix"), "bea": ("duo", "mix"), "cid": ("mix",)}
    assert next(num_walks) == 1


async def test_running_requests_finish_on_the_version_they_started_on(
    engine: TestedEngine, adapters: Path, fusions: Path
) -> None:
    expected = (await collect(engine, long("mix"))).tokens
    with engine.runner.paused():
        (stream,) = await begin(engine, long("mix"))
        write_fusion(fusions, "mix", MEMBERS, adapters, seed=9)
        assert (await engine.load_fusion("mix", None, pin=False, replace=True)).version == 2
        assert not stream.task.done()
    finished = await stream.task
    assert finished.candidates[0].token_ids == expected
    assert finished.adaptation.fusion.version == 1
    fresh = (await collect(engine, long("mix"))).finished
    assert fresh.adaptation.fusion.version == 2
    assert fresh.candidates[0].token_ids != expected


async def test_unload_waits_for_the_running_requests(engine: TestedEngine) -> None:
    expected = (await collect(engine, long("mix"))).tokens
    with engine.runner.paused():
        (stream,) = await begin(engine, long("mix"))
        unloading = asyncio.create_task(engine.unload_fusion("mix", force=False))
        await asyncio.sleep(MOMENT_S)
        assert not unloading.done()
        assert (await engine.get_fusion("mix")).state is AdapterState.DRAINING
        assert (await engine.get_adapter("ada")).held_by_fusions == ("mix",)
    assert await stream.tokens() == expected
    assert (await unloading).state is AdapterState.AVAILABLE
    assert (await engine.get_adapter("ada")).held_by_fusions == ()


async def test_forced_unload_ends_the_running_requests_of_this_fusion_alone(engine: TestedEngine) -> None:
    expected = (await collect(engine, long("duo"))).tokens
    with engine.runner.paused():
        ended, other = await begin(engine, long("mix"), long("duo"))
        unloading = asyncio.create_task(engine.unload_fusion("mix", force=True))
        assert not ended.task.done()
    with pytest.raises(AbortedError) as caught:
        await ended.task
    assert (caught.value.reason, caught.value.metadata) == ("FUSION_UNLOADED", {"fusion": "mix"})
    assert (await unloading).state is AdapterState.AVAILABLE
    assert await other.tokens() == expected


async def test_fusion_unloaded_while_it_is_used_leaves_no_series(engine: TestedEngine) -> None:
    with engine.runner.paused():
        (stream,) = await begin(engine, long("mix"))
        unloading = asyncio.create_task(engine.unload_fusion("mix", force=False))
        await asyncio.sleep(MOMENT_S)
        assert REGISTRY.get_sample_value("fusionserve_fusion_tokens_total", {"fusion": "mix"})
    await asyncio.gather(stream.task, unloading)
    assert REGISTRY.get_sample_value("fusionserve_fusion_tokens_total", {"fusion": "mix"}) is None


async def test_reloaded_fusion_keeps_its_series(engine: TestedEngine) -> None:
    await mix_tokens(engine)
    num_tokens = REGISTRY.get_sample_value("fusionserve_fusion_tokens_total", {"fusion": "mix"})
    assert num_tokens
    await engine.load_fusion("mix", None, pin=False, replace=True)
    assert REGISTRY.get_sample_value("fusionserve_fusion_tokens_total", {"fusion": "mix"}) == num_tokens


async def test_fusion_replaced_while_it_loads_is_the_old_or_the_new_one(
    engine: TestedEngine, adapters: Path, fusions: Path
) -> None:
    expected = await mix_tokens(engine)
    await forget_fusions(engine)
    await engine.unload_adapter("ada", force=False)
    num_reads = engine.num_reads
    with engine.slow_loads():
        loading = asyncio.create_task(engine.load_fusion("mix", None, pin=False, replace=False))
        await until(lambda: engine.num_reads > num_reads)  # the fusion is read, its member is waited for
        write_fusion(fusions, "mix", MEMBERS, adapters, seed=9, temperature=5.0)
    await loading
    assert await mix_tokens(engine) == expected


async def test_fusion_that_fails_to_be_published_lets_its_members_go(
    engine: TestedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patched:
        patched.setattr(engine._fusions.registry, "publish", fail)
        with pytest.raises(InternalError):
            await engine.load_fusion("mix", None, pin=False, replace=False)
    engine.registry.check_integrity(0)


@pytest.fixture
def solos(tmp_path: Path) -> Path:
    """Three fusions of equal size, of one adapter each, that has the same name."""
    for seed, name in enumerate(MEMBERS):
        write_lora(tmp_path / "loras" / name, seed=seed)
        write_fusion(tmp_path / "solos", name, (name,), tmp_path / "loras", seed=seed)
    return tmp_path / "solos"


@pytest.fixture
async def narrow(model: Path, solos: Path) -> AsyncIterator[TestedEngine]:
    """An engine with room for two of them on the host."""
    adapters, options = solos.parent / "loras", {"fusion_dirs": (solos,)}
    async with running_engine(model, adapters, **options) as engine:
        size = (await engine.load_fusion("ada", None, pin=False, replace=False)).host_bytes
        await forget_fusions(engine)
    async with running_engine(model, adapters, **options, fusion_host_bytes=2 * size) as engine:
        yield engine
        await forget_fusions(engine)


async def states_of(engine: TestedEngine) -> list[AdapterState]:
    return [(await engine.get_fusion(name)).state for name in MEMBERS]


async def test_idle_fusion_is_evicted_with_its_hold_on_its_members_and_comes_back(
    narrow: TestedEngine,
) -> None:
    expected = [(await collect(narrow, long(name))).tokens for name in MEMBERS]
    assert len(set(expected)) == len(MEMBERS)
    assert await states_of(narrow) == [AVAILABLE, READY, READY]  # the least recently used one has gone
    assert (await narrow.get_adapter("ada")).held_by_fusions == ()
    assert (await narrow.unload_adapter("ada", force=False)).state is AVAILABLE
    with pytest.raises(PreconditionError):
        await narrow.unload_adapter("cid", force=False)
    assert (await collect(narrow, long("ada"))).tokens == expected[0]
    assert await states_of(narrow) == [READY, AVAILABLE, READY]
    assert (await narrow.get_adapter("ada")).held_by_fusions == ("ada",)


async def test_pinned_fusion_is_not_evicted(narrow: TestedEngine) -> None:
    assert (await narrow.load_fusion("ada", None, pin=True, replace=False)).pinned
    for name in ("bea", "cid"):
        await narrow.load_fusion(name, None, pin=False, replace=False)
    assert await states_of(narrow) == [READY, AVAILABLE, READY]


async def test_fusion_without_room_beside_pinned_and_running_ones_is_refused(narrow: TestedEngine) -> None:
    await narrow.load_fusion("ada", None, pin=True, replace=False)
    with narrow.runner.paused():
        (stream,) = await begin(narrow, long("bea"))
        for attempt in (
            collect(narrow, long("cid")),
            narrow.load_fusion("cid", None, pin=False, replace=False),
        ):
            with pytest.raises(CapacityError) as caught:
                await attempt
            assert caught.value.reason == "FUSION_HOST_FULL"
            assert caught.value.retry_after_s is not None
        assert (await narrow.get_adapter("cid")).held_by_fusions == ()
    await stream.task
    await narrow.load_fusion("cid", None, pin=False, replace=False)
    assert await states_of(narrow) == [READY, AVAILABLE, READY]
