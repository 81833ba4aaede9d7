"""A tiny base with a tokenizer, texts of two kinds, and runs over them: what the tests of training begin from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import make_config, make_pair, write_adapter
from transformers import LlamaConfig, LlamaForCausalLM

from fusionserve.training.frozen_base import FrozenBase, load_base
from fusionserve.training.tokenizer import save_tokenizer, train_tokenizer
from fusionserve.training_config import AdapterRun, DataConfig, FusionRun, OptimizationConfig

# What training's libraries warn of among themselves.
ignoring_libraries = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # PEFT reads it
    "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
)

HIDDEN, INNER, CONTEXT = 32, 40, 128
LETTERS, DIGITS = "abc cab bca ", "123 312 231 "
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_base(directory: Path, hidden: int = HIDDEN, inner: int = INNER) -> Path:
    """A two-layer Llama with random weights and a byte-level tokenizer of a few merges."""
    save_tokenizer(train_tokenizer([LETTERS * 3, DIGITS * 3], 270), directory, CONTEXT)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=272,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def tiny_base(directory: Path) -> FrozenBase:
    """The same, loaded."""
    return load_base(str(write_base(directory)))


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """A file of JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_texts(path: Path, *kinds: str, number: int = 24) -> Path:
    """Examples of each kind in turn, of different lengths."""
    return write_records(path, [{"text": kind * (2 + i % 5)} for i in range(number) for kind in kinds])


def write_member(directory: Path, seed: int) -> Path:
    """A random adapter of q_proj and down_proj in both layers."""
    tensors = {}
    for layer in range(2):
        for name, d_in, d_out in (("self_attn.q_proj", HIDDEN, HIDDEN), ("mlp.down_proj", INNER, HIDDEN)):
            tensors |= make_pair(f"model.layers.{layer}.{name}", d_in, d_out, seed=2 * seed + layer)
    return write_adapter(directory, config=make_config(), tensors={k: v * 0.3 for k, v in tensors.items()})


def optimization(steps: int = 10, **changes: Any) -> OptimizationConfig:
    """A short run."""
    fields: dict[str, Any] = {"learning_rate": 2e-2, "steps": steps, "batch_rows": 4, **changes}
    return OptimizationConfig(**fields)


def adapter_run(root: Path, data: Path, out: str = "letters", **changes: Any) -> AdapterRun:
    """A stage-1 run in `root`, whose base is in root/base."""
    fields: dict[str, Any] = {
        "model": str(root / "base"),
        "out": root / out,
        "data": DataConfig(train=(data,), max_tokens=32),
        "optimization": optimization(),
        "rank": 4,
        "show_progress": False,
        **changes,
    }
    return AdapterRun(**fields)


def fusion_run(root: Path, data: Path, members: dict[str, Path], **changes: Any) -> FusionRun:
    """A stage-2 run in `root`, whose base is in root/base."""
    fields: dict[str, Any] = {
        "name": "mix",
        "model": str(root / "base"),
        "out": root / "mix",
        "members": tuple(members.items()),
        "data": DataConfig(train=(data,), max_tokens=32),
        "optimization": optimization(),
        "d_key": 8,
        "show_progress": False,
        **changes,
    }
    return FusionRun(**fields)
