"""A tiny base model, adapters and fusions on disk, and engines that serve them."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from served_adapters import TestedEngine, running_engine, write_lora, write_model
from served_fusions import forget_fusions, write_members, write_mix_and_duo

from fusionserve.kernels.native_layer import NativeLayers
from fusionserve.kernels.native_library import native_library


@pytest.fixture(autouse=True)
def _hold_to_no_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that says so asks for none; else it would be missing where there are none."""
    if request.node.get_closest_marker("no_kernels") is None:
        yield
        return
    for thread in threading.enumerate():
        if thread.name.endswith("memory"):  # of an engine before, which asks until it has its last piece
            thread.join()
    asked = native_library.cache_info()
    yield
    assert native_library.cache_info() == asked, "it may depend on native kernels: take away its mark"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, name in enumerate("abcd", start=1):
        write_lora(tmp_path / name, seed=seed)
    return tmp_path


@pytest.fixture
async def engine(model: Path, root: Path) -> AsyncIterator[TestedEngine]:
    async with running_engine(model, root) as engine:
        yield engine


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    return write_members(tmp_path / "adapters")


@pytest.fixture
def fusions(tmp_path: Path, adapters: Path) -> Path:
    return write_mix_and_duo(tmp_path / "fusions", adapters)


@pytest.fixture
async def fusion_engine(model: Path, adapters: Path, fusions: Path) -> AsyncIterator[TestedEngine]:
    """Finds adapters and fusions on disk; at the end it lets go of everything."""
    options = {"fusion_dirs": (fusions,), "adapter_pool_ranks": 96, "max_batch_tokens": 24}
    async with running_engine(model, adapters, **options) as engine:
        yield engine
        await forget_fusions(engine)


@pytest.fixture
def native_passes(monkeypatch: pytest.MonkeyPatch) -> list[NativeLayers]:
    """The forward passes whose layers one native call has computed, from here on."""
    passes: list[NativeLayers] = []
    compute_ = NativeLayers.compute_

    def note(layers: NativeLayers, *arguments: Any) -> None:
        passes.append(layers)
        compute_(layers, *arguments)

    monkeypatch.setattr(NativeLayers, "compute_", note)
    return passes
