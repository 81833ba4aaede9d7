"""Members and weights files that no fusion may be folded of, and modules that need not be every member's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_fusions import make_base, make_config, make_member, make_trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.errors import ArtifactError
from fusionserve.fusion.artifact import WEIGHTS_FILE, save_fusion
from fusionserve.fusion.loader import MAX_MAGNITUDE, check_members, in_call_order, read_fusion_params

BASE = make_base()
MEMBERS = [make_member(BASE, 0, (2, 0, 2, 2)), make_member(BASE, 1, (2, 2, 0, 2))]
CONFIG = make_config(BASE, MEMBERS)


def test_modules_are_put_in_the_order_of_the_bases_calls() -> None:
    backwards = replace(CONFIG, modules=CONFIG.modules[::-1])
    assert in_call_order(backwards, BASE).modules == CONFIG.modules == tuple(BASE.by_path)


def as_dora(member: LoRAWeights) -> LoRAWeights:
    path, lora = next(iter(member.modules.items()))
    changed = replace(lora, magnitude=torch.ones(lora.expand.shape[1]))
    return replace(member, modules={**member.modules, path: changed})


def with_head(member: LoRAWeights) -> LoRAWeights:
    return replace(member, replacements={"lm_head": torch.zeros(1)})


def test_module_need_not_be_every_members() -> None:
    check_members(CONFIG, MEMBERS, BASE)


@pytest.mark.parametrize(("change", "why"), [(as_dora, "DoRA"), (with_head, "replaces whole modules")])
def test_member_that_is_more_than_rank_rows_is_refused(
    change: Callable[[LoRAWeights], LoRAWeights], why: str
) -> None:
    with pytest.raises(ArtifactError, match=f"member m1 .*{why}") as refusal:
        check_members(CONFIG, [MEMBERS[0], change(MEMBERS[1])], BASE)
    assert refusal.value.reason == "MEMBER_UNSUPPORTED"


def without_one(tensors: dict[str, Tensor]) -> None:
    del tensors[min(tensors)]


def with_another(tensors: dict[str, Tensor]) -> None:
    tensors["another"] = torch.zeros(1)


def one_wider(tensors: dict[str, Tensor]) -> None:
    name = min(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def one_with(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[min(tensors)].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without_one, "TENSOR_MISSING"),
        (with_another, "UNEXPECTED_TENSOR"),
        (one_wider, "SHAPE_MISMATCH"),
        (one_with(float("nan")), "NOT_FINITE"),
        (one_with(-2 * MAX_MAGNITUDE), "NOT_FINITE"),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused(
    change: Callable[[dict[str, Tensor]], None], reason: str, tmp_path: Path
) -> None:
    save_fusion(tmp_path / "mix", CONFIG, make_trained(CONFIG, BASE, seed=1))
    file = tmp_path / "mix" / WEIGHTS_FILE
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with open_directory(tmp_path / "mix") as directory, pytest.raises(ArtifactError) as refusal:
        read_fusion_params(directory, CONFIG, BASE)
    assert refusal.value.reason == reason
