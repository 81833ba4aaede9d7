"""Adapters that find no room on the host because idle fusions keep their members loaded."""

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
    lora_bytes,
    make_params,
    make_prompt,
    running_engine,
    write_lora,
)
from served_fusions import forget_fusions, fusion, write_fusion

from fusionserve.adapter_status import AdapterState
from fusionserve.errors import CapacityError
from fusionserve.generation import Adaptation, GenerateParams
from fusionserve.metrics import REGISTRY

NAMES = ("ada", "bea", "cid", "dot")
PAIRS = {"first": ("ada", "bea"), "second": ("bea", "cid"), "third": ("cid", "dot")}
READY = AdapterState.READY
NUMBERS = count()


def ask(adaptation: Adaptation) -> GenerateParams:
    return make_params(f"ask-{next(NUMBERS)}", adaptation, make_prompt(2, 7))


@pytest.fixture
async def engine(model: Path, tmp_path: Path) -> AsyncIterator[TestedEngine]:
    """An engine with room for three adapters of equal size, of which `big` needs two; fusions of two, and one."""
    adapters, fusions = tmp_path / "loras", tmp_path / "fusions"
    for seed, name in enumerate(NAMES):
        write_lora(adapters / name, seed=seed)
    write_lora(adapters / "big", seed=8, rank=8)
    for seed, (name, members) in enumerate({**PAIRS, "solo": ("dot",)}.items()):
        write_fusion(fusions, name, members, adapters, seed=seed)
    room = 3 * lora_bytes(4)
    async with running_engine(model, adapters, fusion_dirs=(fusions,), adapter_host_bytes=room) as engine:
        yield engine
        await forget_fusions(engine)


async def fusions_of(engine: TestedEngine) -> list[str]:
    return [status.name for status in await engine.list_fusions() if status.state is READY]


async def adapters_of(engine: TestedEngine) -> list[str]:
    return [status.name for status in await engine.list_adapters() if status.state is READY]


def num_evictions() -> float:
    return REGISTRY.get_sample_value("fusionserve_fusion_evictions_total") or 0.0


async def test_adapter_without_room_takes_that_of_an_idle_fusion(engine: TestedEngine) -> None:
    expected = (await collect(engine, ask(lora("dot")))).tokens
    await collect(engine, ask(fusion("first")))
    await collect(engine, ask(fusion("second")))
    evictions = num_evictions()
    assert (await collect(engine, ask(lora("dot")))).tokens == expected
    assert await fusions_of(engine) == ["second"]
    assert await adapters_of(engine) == ["bea", "cid", "dot"]  # bea is the other fusion's member as well
    assert (await engine.get_adapter("bea")).held_by_fusions == ("second",)
    assert num_evictions() == evictions + 1
    assert REGISTRY.get_sample_value("fusionserve_fusion_tokens_total", {"fusion": "first"}) is None
    assert engine.registry.num_leases == 2


async def test_fusion_without_room_for_its_members_takes_that_of_an_idle_one(engine: TestedEngine) -> None:
    for name in ("first", "third", "second", "first"):
        await collect(engine, ask(fusion(name)))
    assert await fusions_of(engine) == ["first", "second"]


async def test_fusion_whose_going_frees_nothing_stays(engine: TestedEngine) -> None:
    await collect(engine, ask(fusion("first")))
    await collect(engine, ask(fusion("solo")))
    with engine.runner.paused():
        streams = await begin(engine, ask(lora("ada")), ask(lora("bea")))
        await engine.load_adapter("cid", None, pin=None, replace=False)
        assert await fusions_of(engine) == ["first"]
    await asyncio.gather(*(stream.task for stream in streams))


@pytest.mark.parametrize("holder", ["pin", "request", "pinned members"])
async def test_no_fusion_goes_where_that_is_not_enough(engine: TestedEngine, holder: str) -> None:
    for member in PAIRS["first"] if holder == "pinned members" else ():
        await engine.load_adapter(member, None, pin=True, replace=False)
    await engine.load_fusion("first", None, pin=holder == "pin", replace=False)
    await engine.load_fusion("solo", None, pin=False, replace=False)
    evictions = num_evictions()
    with engine.runner.paused():
        streams = await begin(engine, ask(fusion("first"))) if holder == "request" else []
        with pytest.raises(CapacityError) as caught:
            await collect(engine, ask(lora("big")))
        assert caught.value.reason == "ADAPTER_HOST_FULL"
        assert await fusions_of(engine) == ["first", "solo"]
    await asyncio.gather(*(stream.task for stream in streams))
    assert num_evictions() == evictions


async def test_fusion_that_is_being_replaced_stays(engine: TestedEngine, tmp_path: Path) -> None:
    expected = (await collect(engine, ask(fusion("first")))).tokens
    write_fusion(tmp_path / "fusions", "first", ("cid", "dot"), tmp_path / "loras", seed=9)
    with pytest.raises(CapacityError) as caught:
        await engine.load_fusion("first", None, pin=False, replace=True)
    assert caught.value.reason == "ADAPTER_HOST_FULL"
    assert (await engine.get_fusion("first")).version == 1
    assert (await collect(engine, ask(fusion("first")))).tokens == expected


async def test_pinned_member_is_replaced_in_the_room_of_its_idle_fusion(engine: TestedEngine) -> None:
    for name in ("ada", "bea", "dot"):
        await engine.load_adapter(name, None, pin=True, replace=False)
    await collect(engine, ask(fusion("first")))
    assert (await engine.load_adapter("ada", None, pin=None, replace=True)).version == 2
    assert await fusions_of(engine) == []


async def test_replaced_member_that_an_idle_fusion_holds_goes_with_it(engine: TestedEngine) -> None:
    await collect(engine, ask(fusion("first")))
    await engine.load_adapter("ada", None, pin=True, replace=True)
    await collect(engine, ask(lora("dot")))
    assert await fusions_of(engine) == []
    assert await adapters_of(engine) == ["ada", "bea", "dot"]
