"""Fusions written to disk over the adapters of `served_adapters`."""

from __future__ import annotations

from pathlib import Path

import torch
from served_adapters import make_model

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.base_modules import describe_base_modules
from fusionserve.adapters.lora_loader import LoadPolicy, load_lora_weights
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.fusion.artifact import save_fusion
from fusionserve.fusion.config import FusionConfig, FusionMember
from fusionserve.fusion.params import make_params as make_fusion_params


def read_members(root: Path, names: tuple[str, ...]) -> list[LoRAWeights]:
    """The members as the server's loader reads them."""
    base = describe_base_modules(make_model("llama"), model_name="tiny")
    policy = LoadPolicy(dtype=torch.float32, max_rank=64)
    found = []
    for name in names:
        with open_directory(root / name) as directory:
            found.append(
                load_lora_weights(
                    directory,
                    base,
                    policy=policy,
                    budget_bytes=1 << 30,
                    base_weight=lambda path: torch.empty(0),
                )
            )
    return found


def write_fusion(
    root: Path, name: str, members: tuple[str, ...], adapters: Path, *, seed: int, **changes: object
) -> FusionConfig:
    """A fusion with lively random parameters over adapters on disk."""
    base = describe_base_modules(make_model("llama"), model_name="tiny")
    weights = read_members(adapters, members)
    fields: dict[str, object] = {
        "name": name,
        "base_model": "tiny",
        "base_fingerprint": base.fingerprint,
        "members": tuple(FusionMember(n, w.digest) for n, w in zip(members, weights, strict=True)),
        "modules": tuple(path for path in base.by_path if path in weights[0].modules),
        "d_key": 6,
        **changes,
    }
    config = FusionConfig(**fields)  # type: ignore[arg-type]
    torch.manual_seed(seed)
    params = make_fusion_params(config, base)
    for _, parameter in params.named_tensors():
        parameter.data += torch.randn_like(parameter) * 0.5
    save_fusion(root / name, config, params)
    return config
