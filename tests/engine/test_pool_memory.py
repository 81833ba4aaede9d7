"""The pool's memory is there before the first adapter is asked for, whatever else lies in the folders."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
from served_adapters import TestedEngine, write_lora

from fusionserve.adapters.lora_loader import WEIGHTS_FILE
from fusionserve.engine.adapter_loader import AdapterLoader
from fusionserve.engine.pool_memory import PoolMemory

CHANGED = {
    f"model.layers.{layer}.{name}" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")
}


def wait_for_thread() -> None:
    for thread in threading.enumerate():
        if thread.name == "adapter-pool-memory":
            thread.join(30)


@pytest.fixture
def asked(engine: TestedEngine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that memory is got for, without getting it, from here on."""
    asked: list[str] = []
    wait_for_thread()

    def prepare(self: AdapterLoader, paths: Iterable[str]) -> None:
        asked.extend(paths)

    monkeypatch.setattr(AdapterLoader, "prepare", prepare)
    return asked


async def test_memory_is_there_before_a_request(engine: TestedEngine) -> None:
    wait_for_thread()
    base = engine._base
    assert {path for path, rows in base.pool._rows.items() if rows._memory is not None} == CHANGED
    assert base.pool.nbytes == 0, "no step has rows yet"


async def test_what_is_no_adapter_is_passed_over(
    engine: TestedEngine, root: Path, tmp_path: Path, asked: list[str]
) -> None:
    folder = tmp_path / "mixed"
    shutil.copytree(root / "a", folder / "b")
    shutil.copytree(root / "a", folder / "a")
    (folder / "a" / WEIGHTS_FILE).write_bytes(b"no weights")
    (folder / "file").touch()
    (folder / "c").mkdir()
    PoolMemory([tmp_path / "nowhere", folder], engine_loader(engine)).get_soon()
    wait_for_thread()
    assert set(asked) == CHANGED


async def test_no_folder_is_looked_at_for_a_pool_that_needs_nothing_ahead(
    engine: TestedEngine, root: Path, asked: list[str]
) -> None:
    loader = engine_loader(engine)
    loader.prepares_pool = False
    PoolMemory([root], loader).get_soon()
    wait_for_thread()
    assert not asked


async def test_it_can_be_stopped(engine: TestedEngine, root: Path, asked: list[str]) -> None:
    memory = PoolMemory([root], engine_loader(engine))
    memory.stop()
    memory.get_soon()
    wait_for_thread()
    assert not asked


async def test_few_of_many_adapters_are_looked_at(
    engine: TestedEngine, tmp_path: Path, asked: list[str]
) -> None:
    folder = tmp_path / "many"
    for n in range(20):
        write_lora(folder / f"a{n:02}", seed=n)
    PoolMemory([folder], engine_loader(engine)).get_soon()
    wait_for_thread()
    assert len(asked) == 8 * len(CHANGED)


async def test_a_system_without_memory_is_asked_once(
    engine: TestedEngine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    wait_for_thread()

    def prepare(self: AdapterLoader, paths: Iterable[str]) -> None:
        asked.extend(paths)
        raise MemoryError

    monkeypatch.setattr(AdapterLoader, "prepare", prepare)
    PoolMemory([root], engine_loader(engine)).get_soon()
    wait_for_thread()
    assert len(asked) == 1


def engine_loader(engine: TestedEngine) -> AdapterLoader:
    return AdapterLoader(engine._config, engine._base)
