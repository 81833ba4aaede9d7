"""Writes a checkpoint and LoRA adapters of the llama and qwen2 architectures as GGUF, for llama.cpp.

llama.cpp rotates neighbouring pairs of a llama head, transformers the two halves of it: the rows of q and k (and of
their adapters' B) change places. qwen2 heads stay as they are. A file has no vocabulary: prompts are token ids.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, PreTrainedConfig

GGMLType = gguf.GGMLQuantizationType
WEIGHT_TYPES = {"bf16": GGMLType.BF16, "q8_0": GGMLType.Q8_0}

_OUTSIDE_LAYERS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INSIDE_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_gguf_model(checkpoint: Path, path: Path, weight_type: str) -> None:
    """Writes the checkpoint with its matrices in `weight_type` (a key of WEIGHT_TYPES), all else in float32."""
    config = AutoConfig.from_pretrained(checkpoint)
    writer = gguf.GGUFWriter(None, config.model_type)
    _add_shape(writer, config)
    for name, tensor in _tensors(sorted(checkpoint.glob("*.safetensors"))):
        module, _, part = name.rpartition(".")
        rows = _as_gguf_rows(tensor, module, config)
        kind = WEIGHT_TYPES[weight_type] if tensor.dim() == 2 else GGMLType.F32
        _add_tensor(writer, f"{gguf_module(module)}.{part}", rows, kind)
    _write(writer, path)


def save_gguf_adapter(checkpoint: Path, adapter: Path, path: Path) -> None:
    """Writes a PEFT LoRA adapter of the checkpoint in bfloat16, for use with `llama_adapter_lora_init`."""
    config = AutoConfig.from_pretrained(checkpoint)
    writer = gguf.GGUFWriter(None, config.model_type)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(settings["lora_alpha"]))
    for name, tensor in _tensors([adapter / "adapter_model.safetensors"]):
        module, _, half = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        rows = _as_gguf_rows(tensor, module, config) if half == "lora_B" else tensor
        _add_tensor(writer, f"{gguf_module(module)}.weight.{half.lower()}", rows, GGMLType.BF16)
    _write(writer, path)


def gguf_module(module: str) -> str:
    """`model.layers.3.mlp.up_proj` is `blk.3.ffn_up`. Raises KeyError for a module that neither architecture has."""
    if module in _OUTSIDE_LAYERS:
        return _OUTSIDE_LAYERS[module]
    layer, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{int(layer)}.{_INSIDE_LAYERS[inner]}"


def _tensors(files: Iterable[Path]) -> Iterable[tuple[str, torch.Tensor]]:
    return (item for file in files for item in load_file(file).items())


def _add_shape(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _as_gguf_rows(tensor: torch.Tensor, module: str, config: PreTrainedConfig) -> torch.Tensor:
    """`tensor`, with the rows of a llama head as llama.cpp rotates them: (0, half, 1, half + 1, ...)."""
    num_heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
        module.rpartition(".")[2]
    )
    if num_heads is None or config.model_type != "llama":
        return tensor
    halves = tensor.view(num_heads, 2, -1, *tensor.shape[1:])  # [heads, 2, head_dim / 2, ...]
    return halves.transpose(1, 2).reshape(tensor.shape)


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, kind: GGMLType) -> None:
    writer.add_tensor(name, _encode(tensor, kind), raw_dtype=kind)


def _encode(tensor: torch.Tensor, kind: GGMLType) -> NDArray[Any]:
    if kind == GGMLType.BF16:
        return np.ascontiguousarray(tensor.bfloat16().view(torch.uint16).numpy())
    return np.ascontiguousarray(gguf.quants.quantize(tensor.float().numpy(), kind))


def _write(writer: gguf.GGUFWriter, path: Path) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
