"""Which models' experts are packed: those whose code is Mixtral's."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.models
from tiny_models import CONFIGS, make_tiny_model, save_tiny_model
from torch import Tensor
from torch.nn import functional
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import load_base_model
from fusionserve.engine.expert_panels import PLAIN_EXPERTS, bring_experts_into_panels
from fusionserve.engine.quantized_base import BITS
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.packed_linear import can_pack
from fusionserve.kernels.panel_experts import PanelExperts
from fusionserve.kernels.quantized_linear import QuantizedLinear, has_quantized_product

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(16, 2)), reason="the processor has no packed product"
)


def sources() -> Iterator[tuple[str, str]]:
    """Of the experts' classes of transformers, by name: their forward, without spaces and how it is decorated."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        for path in Path(transformers.models.__path__[0], package.name).glob("modeling_*.py"):
            text = path.read_text(encoding="utf-8")
            for match in re.finditer(r"(@\S+\n)class (\w+)\(nn\.Module\):(.*?)(?=\n\S)", text, re.DOTALL):
                decorator, name, body = match.groups()
                if name in PLAIN_EXPERTS:
                    yield name, "".join((decorator + body[body.index("def forward") :]).split())


def test_code_of_all_listed_experts_is_that_of_mixtral() -> None:
    found = dict(sources())
    assert PLAIN_EXPERTS >= found.keys() >= {"MixtralExperts", "Qwen3MoeExperts", "OlmoeExperts"}
    assert {name for name, source in found.items() if source != found["MixtralExperts"]} == set()


@needs_packing
@pytest.mark.parametrize("architecture", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3"])
def test_experts_are_packed(architecture: str, tmp_path: Path) -> None:
    config = EngineConfig(model=str(save_tiny_model(architecture, tmp_path)), model_name="m", num_threads=1)
    model = load_base_model(config).model
    assert any(isinstance(module, PanelExperts) for module in model.modules())


@pytest.mark.skipif(not has_quantized_product(), reason="the processor has no product of bytes")
@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_of_a_quantized_base_are_quantized(architecture: str, quantize: str, tmp_path: Path) -> None:
    config = EngineConfig(model=str(save_tiny_model(architecture, tmp_path)), model_name="m", num_threads=1)
    full, few = load_base_model(config), load_base_model(replace(config, quantize=quantize))
    experts = [module for module in few.model.modules() if isinstance(module, PanelExperts)]
    assert len(experts) == few.model.config.num_hidden_layers
    for module in experts:
        for panels in (module.gate_up, module.down):
            assert isinstance(panels, QuantizedLinear) and panels.bits == BITS[quantize]
    numbers = sum(parameter.numel() for parameter in full.model.parameters())
    assert few.weight_bytes < full.weight_bytes - 2 * numbers  # of float32, more than half is gone


@needs_packing
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_experts_of_a_model_that_goes_to_a_gpu_stay(device: str) -> None:
    """Its weights are on the host while they are quantized one after the other."""
    model = make_tiny_model(CONFIGS["mixtral"]())
    packed = bring_experts_into_panels(model, None, torch.device(device), HugePages())
    assert bool(packed) == any(isinstance(m, PanelExperts) for m in model.modules()) == (device == "cpu")


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_experts_of_other_code_stay(
    bits: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a release of transformers may bring it under a name that is listed: a gate that is limited, say."""
    if bits is not None and not has_quantized_product():
        pytest.skip("the processor has no product of bytes")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config = CONFIGS["mixtral"]()
    config.update(sizes)
    model, limited = (make_tiny_model(config).to(dtype) for _ in range(2))
    assert bring_experts_into_panels(model, bits, torch.device("cpu"), HugePages())
    assert not caplog.messages

    def forward(experts: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(experts.num_experts):
            gate, up = functional.linear(x, experts.gate_up_proj[expert]).chunk(2, dim=-1)
            share = (weights * (chosen == expert)).sum(-1, keepdim=True)
            y += functional.linear(functional.silu(gate.clamp(max=1)) * up, experts.down_proj[expert]) * share
        return y

    monkeypatch.setattr(MixtralExperts, "forward", forward)
    assert not bring_experts_into_panels(limited, bits, torch.device("cpu"), HugePages())
    assert not any(isinstance(module, PanelExperts) for module in limited.modules())
    assert len(caplog.messages) == 1 and "MixtralExperts" in caplog.messages[0]
