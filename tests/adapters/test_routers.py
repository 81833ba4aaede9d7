"""Linear modules that choose or weigh experts keep their full weights, whatever the rest is held in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import make_tiny_model
from transformers import (
    AfmoeConfig,
    HunYuanMoEV1Config,
    LongcatFlashConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from fusionserve.adapters.nf4 import nf4_modules
from fusionserve.adapters.routers import router_paths
from fusionserve.config import EngineConfig
from fusionserve.engine.base_model import load_base_model
from fusionserve.kernels.quantized_linear import QuantizedLinear

_SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_EXPERTS = {**_SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

# Config of a mixture; its routers.
MIXTURES: dict[str, tuple[PreTrainedConfig, list[str]]] = {
    "afmoe": (
        AfmoeConfig(**_EXPERTS, num_dense_layers=1, layer_types=["full_attention"] * 2),
        ["model.layers.1.mlp.router.gate"],
    ),
    "hunyuan_v1_moe": (
        HunYuanMoEV1Config(**_SIZES, num_experts=8, moe_topk=2),
        ["model.layers.0.mlp.gate.wg", "model.layers.1.mlp.gate.wg"],
    ),
    "qwen2_moe": (
        Qwen2MoeConfig(**_EXPERTS, shared_expert_intermediate_size=64),
        ["model.layers.0.mlp.shared_expert_gate", "model.layers.1.mlp.shared_expert_gate"],
    ),
    "mixtral": (MixtralConfig(**_SIZES, num_local_experts=8), []),
}


@pytest.mark.parametrize(("config", "routers"), MIXTURES.values(), ids=MIXTURES)
def test_routers_are_found(config: PreTrainedConfig, routers: list[str]) -> None:
    assert sorted(router_paths(make_tiny_model(config))) == routers


def test_router_may_choose_experts_without_weights() -> None:
    config = LongcatFlashConfig(
        vocab_size=80,
        hidden_size=64,
        num_layers=1,
        num_attention_heads=4,
        ffn_hidden_size=64,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        zero_expert_num=4,
        expert_ffn_hidden_size=64,
        moe_topk=2,
    )
    assert router_paths(make_tiny_model(config)) == {"model.layers.0.mlp.router.classifier"}


@pytest.mark.parametrize("quantize", ["int8", "int4", "nf4"])
@pytest.mark.parametrize(("config", "routers"), MIXTURES.values(), ids=MIXTURES)
def test_routers_keep_their_weights(
    config: PreTrainedConfig, routers: list[str], quantize: str, tmp_path: Path
) -> None:
    model = make_tiny_model(config)
    model.save_pretrained(tmp_path)
    base = load_base_model(
        EngineConfig(model=str(tmp_path), model_name="m", quantize=quantize, num_threads=1)
    )
    for path in routers:
        assert torch.equal(base.base_weight(path), model.get_submodule(path).weight)
    others = [base._base_module(path) for path in base.modules.by_path if path.endswith("q_proj")]
    assert all(isinstance(m, QuantizedLinear) or m in nf4_modules(base.model).values() for m in others)
