"""Makes checkpoints, LoRA adapters and fusions of real models' shapes with random weights: speed needs no download."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

SHAPES: dict[str, PreTrainedConfig] = {
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    "qwen2.5-0.5b": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "gemma-3-1b": Gemma3TextConfig(
        vocab_size=262144,
        hidden_size=1152,
        intermediate_size=6912,
        num_hidden_layers=26,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=False,
    ),
    # So small that a benchmark can be tried out anywhere.
    "tiny": LlamaConfig(
        vocab_size=40960,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    ),
}

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class FusionShape:
    """Where a fusion has its attentions, and how wide their keys are; it has member keys and no V."""

    scope: str  # "layer": at every q_proj; "module": at all seven projections
    d_key: int = 64


def save_checkpoint(shape: str, directory: Path) -> None:
    """Writes a random bfloat16 checkpoint of `shape` (a key of SHAPES), without a tokenizer; seeded."""
    make_model(shape, torch.device("cpu")).save_pretrained(directory)


def make_model(shape: str, device: torch.device) -> PreTrainedModel:
    """A random bfloat16 model of `shape`, made where it is to compute; seeded."""
    torch.manual_seed(0)
    config = deepcopy(SHAPES[shape])  # the model keeps it, and marks it
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    made: PreTrainedModel = model.train(mode=False).requires_grad_(requires_grad=False)
    return made


def save_adapter(shape: str, directory: Path, *, rank: int, seed: int) -> None:
    """Writes a random LoRA of `rank` on all seven projections, in PEFT's format; seeded."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (d_in, d_out) in _projection_sizes(SHAPES[shape]).items():
        prefix = f"base_model.model.{path}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * d_in**-0.5
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * 0.02
    directory.mkdir(parents=True)
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(_PROJECTIONS)}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def save_fusion(
    shape: str, directory: Path, members: Sequence[Path], fusion: FusionShape, *, seed: int
) -> None:
    """Writes a random fusion of saved adapters, named like their directories, on all seven projections; seeded.

    It names no base, so a server takes it with `--allow-base-mismatch on` only.
    """
    sizes = _projection_sizes(SHAPES[shape])
    attended = {path: size for path, size in sizes.items() if fusion.scope == "module" or "q_proj" in path}
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path, (d_in, d_out) in attended.items():
        tensors[f"{path}.query.weight"] = torch.randn(fusion.d_key, d_in, generator=generator)
        tensors[f"{path}.query.bias"] = torch.randn(fusion.d_key, generator=generator)
        tensors[f"{path}.key.weight"] = torch.randn(fusion.d_key, d_out, generator=generator)
        tensors[f"{path}.member_keys"] = torch.randn(len(members), fusion.d_key, generator=generator)
    directory.mkdir(parents=True)
    save_file(
        {name: tensor * _ATTENTION_STD for name, tensor in tensors.items()},
        directory / "fusion_model.safetensors",
    )
    config = _fusion_config(directory.name, members, list(sizes), fusion)
    (directory / "fusion_config.json").write_text(json.dumps(config))


def _fusion_config(
    name: str, members: Sequence[Path], modules: Sequence[str], fusion: FusionShape
) -> dict[str, object]:
    return {
        "format_version": 1,
        "name": name,
        "base_model": {"name": "random", "fingerprint": ""},
        "members": [{"name": member.name, "sha256": _weights_digest(member)} for member in members],
        "modules": modules,
        "scope": fusion.scope,
        "d_key": fusion.d_key,
        "member_keys": True,
        "value": {"kind": "none"},
        "temperature": 1.0,
        "base_member": False,
        "training": {},
    }


def _weights_digest(adapter: Path) -> str:
    return hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def head_width(config: PreTrainedConfig) -> int:
    """Numbers of an attention head."""
    width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width


def _projection_sizes(config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    query, kv = (
        head_width(config) * heads for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    sizes = {
        "self_attn.q_proj": (hidden, query),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (query, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{n}.{name}": size
        for n in range(config.num_hidden_layers)
        for name, size in sizes.items()
    }
