"""The modules of every supported family, and nothing that low-rank rows cannot stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusionserve.adapters.base_modules import ModuleKind, describe_base_modules
from fusionserve.config import EMBEDDED_MODEL, EMBEDDED_MODEL_NAME

COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MIXTURE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}

# Family: changes to its config, adaptable linear modules per layer, one of their names.
FAMILIES: dict[str, tuple[Mapping[str, object], int, str]] = {
    "llama": ({}, 7, "model.layers.1.self_attn.q_proj"),
    "qwen2": ({}, 7, "model.layers.1.mlp.down_proj"),
    "qwen3": ({}, 7, "model.layers.0.self_attn.o_proj"),
    "mistral": ({}, 7, "model.layers.0.self_attn.v_proj"),
    "gemma2": ({}, 7, "model.layers.0.mlp.gate_proj"),
    "gemma3_text": ({}, 7, "model.layers.0.mlp.up_proj"),
    "phi3": ({}, 4, "model.layers.0.self_attn.qkv_proj"),
    "gpt_neox": ({}, 4, "gpt_neox.layers.1.attention.query_key_value"),
    "gpt2": ({"n_embd": 16, "n_layer": 2, "n_head": 2}, 4, "transformer.h.1.attn.c_attn"),
    "opt": ({"ffn_dim": 24, "word_embed_proj_dim": 16}, 6, "model.decoder.layers.1.self_attn.q_proj"),
    "mixtral": (MIXTURE, 4, "model.layers.1.self_attn.k_proj"),
    "qwen3_moe": (MIXTURE, 4, "model.layers.1.self_attn.k_proj"),
}


def make_model(family: str, changes: Mapping[str, object]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **changes}))


@pytest.mark.parametrize(("family", "row"), FAMILIES.items(), ids=FAMILIES)
def test_modules_of_a_family(family: str, row: tuple[Mapping[str, object], int, str]) -> None:
    changes, num_per_layer, example = row
    model = make_model(family, changes)
    base = describe_base_modules(model)
    assert base.embedding is not None and base.lm_head is not None
    assert (base.vocab_size, base.hidden_size, base.num_layers) == (40, 16, 2)
    assert (base.embedding.d_in, base.embedding.d_out) == (40, 16)
    assert (base.lm_head.d_in, base.lm_head.d_out) == (16, 40)
    assert example in base.by_path
    assert len(base.by_path) == 2 * num_per_layer + 2
    assert not any("expert" in path or "router" in path for path in base.by_path)


@pytest.mark.parametrize(("family", "row"), FAMILIES.items(), ids=FAMILIES)
def test_shapes_are_those_of_the_weights(family: str, row: tuple[Mapping[str, object], int, str]) -> None:
    model = make_model(family, row[0])
    for path, module in describe_base_modules(model).by_path.items():
        live = model.get_submodule(path)
        assert tuple(live.weight.shape) == module.weight_shape
        assert isinstance(live, Conv1D) is (module.kind is ModuleKind.CONV1D)
        assert (getattr(live, "bias", None) is not None) is module.has_bias


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_fingerprint_is_the_same_in_every_type(stored: torch.dtype, prefix: str, tmp_path: Path) -> None:
    """float16 has lost what bfloat16 keeps of small numbers; a checkpoint may lack the model's prefix."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON)).to(stored)
    model.model.embed_tokens.weight.data *= 0.01
    model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    model.save_pretrained(tmp_path)
    found = {
        describe_base_modules(
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), directory=tmp_path
        ).fingerprint
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    assert found == {describe_base_modules(model).fingerprint}
    in_parts = AutoModelForCausalLM.from_pretrained(tmp_path / "parts", dtype=torch.float16)
    assert {describe_base_modules(in_parts, directory=tmp_path / "parts").fingerprint} == found
    file = tmp_path / "model.safetensors"
    save_file({name.replace("model.", prefix, 1): t for name, t in load_file(file).items()}, file)
    model = model.to(torch.float16)
    for stray in ("consolidated.safetensors", "adapter_model.safetensors"):  # not what transformers reads
        save_file({name: torch.zeros_like(t) for name, t in load_file(file).items()}, tmp_path / stray)
    (tmp_path / "zz.safetensors").write_bytes(b"no such file")
    assert {describe_base_modules(model, directory=tmp_path).fingerprint} == found
    assert describe_base_modules(model).fingerprint not in found


def test_tied_head_is_known() -> None:
    assert describe_base_modules(make_model("gpt2", FAMILIES["gpt2"][0])).is_tied
    assert not describe_base_modules(make_model("llama", {"tie_word_embeddings": False})).is_tied


def test_served_name_wins_over_the_checkpoint() -> None:
    model = make_model("llama", {})
    model.name_or_path = "/models/Qwen2.5-0.5B/"
    named = describe_base_modules(model, model_name="org/served")
    assert (named.model_name, named.checkpoint_names) == ("served", ("Qwen2.5-0.5B",))
    assert describe_base_modules(model).model_name == "Qwen2.5-0.5B"


def test_embedded_model_is_known_by_its_own_name_whatever_it_is_served_as() -> None:
    model = make_model("llama", {})
    model.name_or_path = str(EMBEDDED_MODEL)
    named = describe_base_modules(model, model_name="demo")
    assert (named.model_name, named.checkpoint_names) == ("demo", ("base", EMBEDDED_MODEL_NAME))


def test_linear_with_a_forward_of_its_own_is_left_out() -> None:
    class Router(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input).softmax(-1)

    model = make_model("llama", {})
    model.model.layers[0].router = Router(16, 4)
    assert "model.layers.0.router" not in describe_base_modules(model).by_path


def test_description_cannot_be_changed() -> None:
    base = describe_base_modules(make_model("llama", {}))
    with pytest.raises(TypeError):
        base.by_path["x"] = base.by_path["lm_head"]  # type: ignore[index]
