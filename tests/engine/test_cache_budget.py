"""The KV cache's share of a GPU, by what the driver says is free."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from fusionserve.adapters.base_modules import BaseModule, ModuleKind
from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import BaseModel
from fusionserve.engine.cache_budget import cache_budget, pool_bytes, step_bytes

CONFIG = EngineConfig(model="", model_name="m", adapter_pool_ranks=512, max_batch_tokens=8192)
GIB = 1 << 30


def make_base(device: str) -> BaseModel:
    """As wide as Llama 3.1 8B."""
    widths = [
        (4096, 4096),
        (4096, 1024),
        (4096, 1024),
        (4096, 4096),
        (4096, 14336),
        (4096, 14336),
        (14336, 4096),
    ]
    linear, head = ModuleKind.LINEAR, ModuleKind.LM_HEAD
    sizes = [*((linear, *each) for each in 32 * widths), (head, 4096, 128256)]
    modules = {
        str(place): BaseModule(path=str(place), kind=kind, d_in=d_in, d_out=d_out, has_bias=False)
        for place, (kind, d_in, d_out) in enumerate(sizes)
    }
    base = SimpleNamespace(
        device=torch.device(device),
        modules=SimpleNamespace(by_path=modules),
        dtype=torch.bfloat16,
        vocab_size=128256,
    )
    return cast(BaseModel, base)


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    num_bytes = 120 * GIB
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (num_bytes, 140 * GIB))
    return num_bytes


def test_gpu_gives_what_is_left(free: int) -> None:
    base = make_base("cuda")
    pool, step = pool_bytes(base, 512), step_bytes(CONFIG, base)
    assert 2 * GIB < pool < 4 * GIB and 3 * GIB < step < 6 * GIB
    assert cache_budget(CONFIG, base) == int(free * 0.9) - pool - step > 90 * GIB


def test_budget_of_a_full_gpu_is_nothing(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (GIB, 140 * GIB))
    assert cache_budget(CONFIG, make_base("cuda")) == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_configured_size_holds_on_any_device(device: str, free: int) -> None:
    assert cache_budget(replace(CONFIG, kv_cache_bytes=7 * GIB), make_base(device)) == 7 * GIB


def test_host_gives_half_a_gibibyte() -> None:
    assert cache_budget(CONFIG, make_base("cpu")) == GIB // 2
