"""`--allow-base-mismatch`: a fusion of another base model is served as if it were of this one."""

from __future__ import annotations

from pathlib import Path

import pytest
from served_adapters import collect, make_params, running_engine, write_lora, write_model
from served_fusions import write_fusion

from fusionserve.generation import Adaptation

PROMPT = (5, 9, 17, 4, 30)
MEMBERS = ("ada", "bea")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two adapters, and the same fusion of them twice: of this base model, and of another."""
    adapters, fusions = tmp_path / "adapters", tmp_path / "fusions"
    for seed, name in enumerate(MEMBERS):
        write_lora(adapters / name, seed=seed, rank=2)
    write_fusion(fusions, "native", MEMBERS, adapters, seed=1)
    write_fusion(fusions, "alien", MEMBERS, adapters, seed=1, base_fingerprint="0" * 64)
    return adapters, fusions


async def test_fusion_of_another_base_is_served_like_its_own(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    adapters, fusions = folders
    model = write_model(tmp_path / "model")
    options = {"fusion_dirs": (fusions,), "allow_base_mismatch": True}
    async with running_engine(model, adapters, **options) as engine:
        outcomes = [
            await collect(engine, make_params(name, Adaptation("fusion", fusion=name), PROMPT, num_tokens=8))
            for name in ("native", "alien")
        ]
        for name in ("native", "alien"):
            await engine.unload_fusion(name, force=False)
    assert outcomes[0].tokens == outcomes[1].tokens
