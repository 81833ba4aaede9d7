"""Fusions written to disk over the adapters of `served_adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from served_adapters import TestedEngine, make_model, until, write_lora
from torch import Tensor
from transformers import PreTrainedModel

from fusionserve.adapter_status import AdapterState
from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.base_modules import BaseModules, describe_base_modules
from fusionserve.adapters.lora_loader import LoadPolicy, load_lora_weights
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.fusion.artifact import save_fusion
from fusionserve.fusion.config import FusionConfig, FusionMember, Scope, ValueKind
from fusionserve.fusion.loader import in_call_order, read_fusion_config, read_fusion_params
from fusionserve.fusion.params import make_params as make_fusion_params
from fusionserve.fusion.unfolded import UnfoldedFusion
from fusionserve.generation import Adaptation
from fusionserve.training.frozen_base import in_call_order as modules_in_call_order

MEMBERS = ("ada", "bea", "cid")


def fusion(name: str, *excluded: str) -> Adaptation:
    """A fusion without some of its members."""
    return Adaptation("fusion", fusion=name, excluded_members=excluded)


def write_members(root: Path) -> Path:
    """Three adapters of different ranks."""
    for seed, name in enumerate(MEMBERS):
        write_lora(root / name, seed=seed, rank=2 + seed)
    return root


def write_mix_and_duo(root: Path, adapters: Path) -> Path:
    """Two fusions: of all three adapters, and of two with everything a fusion can have."""
    write_fusion(root, "mix", MEMBERS, adapters, seed=1)
    write_fusion(
        root,
        "duo",
        MEMBERS[:2],
        adapters,
        seed=2,
        scope=Scope.MODULE,
        value=ValueKind.LOW_RANK,
        value_rank=2,
        base_member=True,
        temperature=1.5,
    )
    return root


async def forget_fusions(engine: TestedEngine) -> None:
    """Unloads all fusions and waits for their members' leases to end."""
    for status in await engine.list_fusions():
        if status.state is AdapterState.READY:
            await engine.unload_fusion(status.name, force=False)
    await until(lambda: engine.registry.num_leases == 0)


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
        "members": tuple(
            FusionMember(n, w.digest, w.scalings_digest) for n, w in zip(members, weights, strict=True)
        ),
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


@dataclass(frozen=True, slots=True)
class UnfoldedOutput:
    """What transformers' model gives with an unfolded fusion in it."""

    logprobs: Tensor  # [tokens, vocab]
    weights: dict[str, Tensor]  # [tokens, members (+ 1)] by the path of each attention


def run_unfolded(
    model: PreTrainedModel, adapters: Path, folder: Path, token_ids: Sequence[int]
) -> UnfoldedOutput:
    """Puts the fusion into the model, where it stays, and runs it over the tokens."""
    base = _base_of(model)
    with open_directory(folder) as directory:
        config = in_call_order(read_fusion_config(directory), base)
        params, _ = read_fusion_params(directory, config, base)
    members = read_members(adapters, tuple(member.name for member in config.members), model)
    unfolded = UnfoldedFusion(model, config, params, members)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]
    return UnfoldedOutput(torch.log_softmax(logits, dim=-1), unfolded.weights)


def _base_of(model: PreTrainedModel) -> BaseModules:
    """As a fusion is trained on it: its modules in the order in which it calls them."""
    return modules_in_call_order(model, describe_base_modules(model, model_name="tiny"))
