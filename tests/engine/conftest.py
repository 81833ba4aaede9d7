"""A tiny base model, four adapters on disk, and an engine that serves them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from served_adapters import TestedEngine, running_engine, write_lora, write_model


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
