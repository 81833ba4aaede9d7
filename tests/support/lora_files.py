"""Makers of adapter directories in PEFT's format, right and wrong ones, and the loader with test defaults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.base_modules import BaseModule, BaseModules, ModuleKind
from fusionserve.adapters.lora_loader import WEIGHTS_FILE, LoadPolicy, load_lora_weights, pageable_memory
from fusionserve.adapters.lora_weights import LoRAWeights

CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."
VOCAB, HIDDEN, INNER = 40, 16, 24

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN_PROJ = "model.layers.1.mlp.down_proj"
EMBEDDING = "model.embed_tokens"
LM_HEAD = "lm_head"


def make_base_modules(*, model_name: str = "tiny", is_tied: bool = False) -> BaseModules:
    """A two-layer base with q_proj and down_proj per layer, an embedding and a head."""
    modules = [
        make_module(EMBEDDING, VOCAB, HIDDEN, ModuleKind.EMBEDDING),
        *(make_module(f"model.layers.{layer}.self_attn.q_proj", HIDDEN, HIDDEN) for layer in (0, 1)),
        *(make_module(f"model.layers.{layer}.mlp.down_proj", INNER, HIDDEN) for layer in (0, 1)),
        make_module(LM_HEAD, HIDDEN, VOCAB, ModuleKind.LM_HEAD),
    ]
    return BaseModules(
        model_name=model_name,
        checkpoint_names=(),
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        num_layers=2,
        is_tied=is_tied,
        by_path=MappingProxyType({module.path: module for module in modules}),
    )


def make_module(path: str, d_in: int, d_out: int, kind: ModuleKind = ModuleKind.LINEAR) -> BaseModule:
    """One module without a bias."""
    return BaseModule(path=path, kind=kind, d_in=d_in, d_out=d_out, has_bias=False)


def make_config(**changes: object) -> dict[str, object]:
    """A rank-2 configuration with scaling 2."""
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, **changes}


def make_pair(path: str, d_in: int, d_out: int, *, rank: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """A and B of one linear module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{PREFIX}{path}.lora_A.weight": torch.randn(rank, d_in, generator=generator),
        f"{PREFIX}{path}.lora_B.weight": torch.randn(d_out, rank, generator=generator),
    }


def make_tensors() -> dict[str, Tensor]:
    """Pairs for one q_proj and one down_proj."""
    return {**make_pair(Q_PROJ, HIDDEN, HIDDEN), **make_pair(DOWN_PROJ, INNER, HIDDEN, seed=1)}


def write_adapter(
    directory: Path,
    *,
    config: Mapping[str, object] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> Path:
    """Writes both files; what is not given is made."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(make_config() if config is None else config))
    save_file(dict(make_tensors() if tensors is None else tensors), directory / WEIGHTS_FILE)
    return directory


def encode_safetensors(header: object, data: bytes = b"", *, header_bytes: int | None = None) -> bytes:
    """A file of any header, also a wrong one; `header_bytes` is what the length field says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if header_bytes is None else header_bytes
    return length.to_bytes(8, "little") + text + data


def no_base_weight(path: str) -> Tensor:
    """For adapters that copy no base weight."""
    raise AssertionError(f"the loader asked for the base weight of {path}")


def load_directory(
    directory: Path,
    base: BaseModules | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_rank: int = 64,
    budget_bytes: int = 1 << 30,
    model: nn.Module | None = None,
    allow_base_mismatch: bool = False,
    new_memory: Callable[[int], Tensor] = pageable_memory,
    taken_bytes: Callable[[int], int] = int,
) -> LoRAWeights:
    """The loader with roomy limits; base weights come from `model`."""

    def base_tensor(path: str, name: str) -> Tensor:
        assert model is not None
        tensor = getattr(model.get_submodule(path), name)
        assert isinstance(tensor, Tensor)
        return tensor

    policy = LoadPolicy(
        dtype=dtype,
        max_rank=max_rank,
        allow_base_mismatch=allow_base_mismatch,
        new_memory=new_memory,
        taken_bytes=taken_bytes,
    )
    with open_directory(directory) as opened:
        return load_lora_weights(
            opened,
            base or make_base_modules(),
            policy=policy,
            budget_bytes=budget_bytes,
            base_weight=no_base_weight if model is None else partial(base_tensor, name="weight"),
            base_bias=partial(base_tensor, name="bias"),
        )
