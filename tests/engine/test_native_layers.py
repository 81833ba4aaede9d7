"""What a base is computed with: which modules are packed, and which layers are the engine's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import CONFIGS, save_tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fusionserve.adapters.adapted_embedding import AdaptedEmbedding
from fusionserve.adapters.adapted_linear import AdaptedLinear
from fusionserve.config import EMBEDDED_MODEL, EngineConfig
from fusionserve.engine.base_model import BaseModel, load_base_model
from fusionserve.engine.decoder_layer import DecoderLayer, install_decoder_layers
from fusionserve.kernels.linear_product import PanelEmbedding
from fusionserve.kernels.packed_linear import PackedLinear, can_pack

OWN_LAYERS = {"llama", "mistral", "qwen2", "qwen3"}

needs_packing = pytest.mark.skipif(
    not can_pack(torch.zeros(16, 2, dtype=torch.bfloat16)), reason="the processor has no packed product"
)


def load(directory: Path, dtype: str = "float32") -> BaseModel:
    return load_base_model(EngineConfig(model=str(directory), model_name="m", dtype=dtype, num_threads=1))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_own_layers_stand_in_for_those_of_the_llama_family(name: str, tmp_path: Path) -> None:
    model = load(save_tiny_model(name, tmp_path)).model
    own = sum(isinstance(module, DecoderLayer) for module in model.modules())
    assert own == (model.config.num_hidden_layers if name in OWN_LAYERS else 0)


def test_layer_with_another_activation_stays(tmp_path: Path) -> None:
    directory = save_tiny_model("llama", tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    assert not any(isinstance(module, DecoderLayer) for module in load(directory).model.modules())


def test_layer_without_adapted_modules_stays(tmp_path: Path) -> None:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(save_tiny_model("llama", tmp_path))
    assert install_decoder_layers(model) == 0


@needs_packing
def test_bfloat16_base_is_packed_and_held_once() -> None:
    base = load(EMBEDDED_MODEL, "bfloat16")
    linear = [module for module in base.model.modules() if isinstance(module, AdaptedLinear)]
    assert linear and all(isinstance(module.base, PackedLinear) for module in linear)
    original = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.bfloat16)
    assert base.weight_bytes == sum(parameter.nbytes for parameter in original.parameters())
    for path, module in original.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            assert torch.equal(base.base_weight(path), module.weight), path


@needs_packing
def test_tied_embedding_reads_the_memory_of_the_head() -> None:
    model = load(EMBEDDED_MODEL, "bfloat16").model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, AdaptedEmbedding) and isinstance(embedding.base, PanelEmbedding)
    assert isinstance(head.base, PackedLinear)
    assert embedding.base.head.packed.data_ptr() == head.base.packed.data_ptr()


def test_float32_base_is_not_packed() -> None:
    model = load(EMBEDDED_MODEL).model
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
