"""GGUF files read back with gguf's own reader."""

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from fusionserve.loadtest import model_shapes
from fusionserve.loadtest.bench.gguf_files import gguf_module, save_gguf_adapter, save_gguf_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, PreTrainedConfig] = {"llama": LlamaConfig(**SIZES), "qwen2": Qwen2Config(**SIZES)}


@pytest.fixture(params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = str(request.param)
    monkeypatch.setitem(model_shapes.SHAPES, name, SHAPES[name])
    return name


def tensors(path: Path) -> dict[str, tuple[Sequence[int], torch.Tensor]]:
    """Shape in the order of torch, and values in float32."""
    found = {}
    for each in gguf.GGUFReader(path).tensors:
        values = torch.from_numpy(np.array(gguf.quants.dequantize(each.data, each.tensor_type)))
        found[each.name] = (tuple(int(n) for n in reversed(each.shape)), values.float())
    return found


def rotated(shape: str, weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The rows in the order that llama.cpp rotates in, spelled out."""
    if shape != "llama":
        return weight
    size = weight.shape[0] // num_heads
    order = [
        head * size + half * size // 2 + pair
        for head in range(num_heads)
        for pair in range(size // 2)
        for half in (0, 1)
    ]
    return weight[order]


@pytest.mark.parametrize("weight_type", ["bf16", "q8_0"])
def test_model_reads_back(shape: str, weight_type: str, tmp_path: Path) -> None:
    model_shapes.save_checkpoint(shape, tmp_path / "base")
    save_gguf_model(tmp_path / "base", tmp_path / "model.gguf", weight_type)
    written, read = (
        load_file(tmp_path / "base" / "model.safetensors"),
        tensors(tmp_path / "model.gguf"),
    )
    assert len(written) == len(read)
    for name, weight in written.items():
        module, _, part = name.rpartition(".")
        num_heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2])
        expected = rotated(shape, weight, num_heads) if num_heads else weight
        stored_shape, values = read[f"{gguf_module(module)}.{part}"]
        assert stored_shape == tuple(weight.shape)
        tolerance = 0 if weight_type == "bf16" or weight.dim() == 1 else weight.abs().max() / 127
        torch.testing.assert_close(values, expected.float(), atol=float(tolerance), rtol=0)


def test_model_has_the_settings_that_llama_cpp_needs(shape: str, tmp_path: Path) -> None:
    model_shapes.save_checkpoint(shape, tmp_path / "base")
    save_gguf_model(tmp_path / "base", tmp_path / "model.gguf", "bf16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    settings = {name: field.contents() for name, field in fields.items()}
    assert settings["general.architecture"] == shape
    assert settings["tokenizer.ggml.model"] == "no_vocab"
    assert settings[f"{shape}.vocab_size"] == 64
    assert settings[f"{shape}.block_count"] == 2
    assert settings[f"{shape}.attention.head_count"] == 4
    assert settings[f"{shape}.attention.head_count_kv"] == 2
    assert settings[f"{shape}.rope.freq_base"] == 10000.0


def test_adapter_reads_back(shape: str, tmp_path: Path) -> None:
    model_shapes.save_checkpoint(shape, tmp_path / "base")
    model_shapes.save_adapter(shape, tmp_path / "adapter", rank=4, seed=0)
    save_gguf_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "adapter.gguf")
    written, read = (
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
        tensors(tmp_path / "adapter.gguf"),
    )
    assert len(written) == len(read)
    module = "base_model.model.model.layers.1.self_attn.k_proj"
    torch.testing.assert_close(
        read["blk.1.attn_k.weight.lora_a"][1], written[f"{module}.lora_A.weight"].float()
    )
    expected = rotated(shape, written[f"{module}.lora_B.weight"], 2).float()
    torch.testing.assert_close(read["blk.1.attn_k.weight.lora_b"][1], expected)
    alpha = gguf.GGUFReader(tmp_path / "adapter.gguf").fields["adapter.lora.alpha"].contents()
    assert alpha == 4.0


def test_unknown_module_is_an_error() -> None:
    with pytest.raises(KeyError):
        gguf_module("model.layers.0.mlp.router")
