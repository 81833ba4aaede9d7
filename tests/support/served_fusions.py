"""Fusions written to disk over the adapters of `served_adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from served_adapters import make_model
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.base_modules import BaseModules, describe_base_modules
from fusionserve.adapters.lora_loader import LoadPolicy, load_lora_weights
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.fusion.artifact import save_fusion
from fusionserve.fusion.config import FusionConfig, FusionMember
from fusionserve.fusion.loader import in_call_order, read_fusion_config, read_fusion_params
from fusionserve.fusion.params import make_params as make_fusion_params
from fusionserve.fusion.unfolded import UnfoldedFusion
from fusionserve.training.frozen_base import in_call_order as modules_in_call_order


def read_members(
    root: Path, names: tuple[str, ...], model: PreTrainedModel | None = None
) -> list[LoRAWeights]:
    """The members as the server's loader reads them, for the tiny llama if no model is given."""
    base = _base_of(model or make_model("llama"))
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
    root: Path,
    name: str,
    members: tuple[str, ...],
    adapters: Path,
    *,
    seed: int,
    model: PreTrainedModel | None = None,
    **changes: object,
) -> FusionConfig:
    """A fusion with lively random parameters over adapters on disk, of the tiny llama if no model is given."""
    base = _base_of(model or make_model("llama"))
    weights = read_members(adapters, members, model)
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


def unfolded_logprobs(
    model: PreTrainedModel, adapters: Path, fusion: Path, token_ids: Sequence[int]
) -> Tensor:
    """Log-probabilities [tokens, vocab] of transformers' model with the unfolded fusion put in, which stays."""
    base = _base_of(model)
    with open_directory(fusion) as directory:
        config = in_call_order(read_fusion_config(directory), base)
        params, _ = read_fusion_params(directory, config, base)
    members = read_members(adapters, tuple(member.name for member in config.members), model)
    UnfoldedFusion(model, config, params, members)
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return torch.log_softmax(logits, dim=-1)


def _base_of(model: PreTrainedModel) -> BaseModules:
    """As a fusion is trained on it: its modules in the order in which it calls them."""
    return modules_in_call_order(model, describe_base_modules(model, model_name="tiny"))
