"""Brings the weights of routed experts into panels, where the CPU has the product for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusionserve.engine.layer_form import ACTIVATIONS, is_of_transformers
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.packed_experts import PackedExperts, can_pack_experts

# Models of transformers whose experts all have the code of Mixtral's; tests/engine/test_experts.py looks.
PLAIN_EXPERTS = {
    f"{model}Experts"
    for model in (
        *("Mixtral", "Qwen2Moe", "Qwen3Moe", "Qwen3Next", "Qwen3_5Moe", "Olmoe", "FlexOlmo", "Phimoe"),
        *("DeepseekV2", "DeepseekV3", "GraniteMoe", "GraniteMoeShared", "GraniteMoeHybrid", "Jamba"),
        *("Dots1", "Ernie4_5_Moe", "Glm4Moe", "Glm4MoeLite", "HunYuanMoEV1", "Lfm2Moe", "MiniMax"),
        *("MiniMaxM2", "SolarOpen", "ExaoneMoe", "Afmoe"),
    )
}


@torch.no_grad()
def bring_experts_into_panels(model: nn.Module, device: torch.device, pages: HugePages) -> list[Tensor]:
    """Puts PackedExperts in place of all that they can stand in for; returns their weights.

    Of a model that is to compute on a GPU none, also while it is still on the host.
    """
    packed: list[Tensor] = []
    if device.type != "cpu":
        return packed
    for module in list(model.modules()):
        for name, child in module.named_children():
            experts = _to_panels(child, pages)
            if experts is not None:
                setattr(module, name, experts)
                packed += [experts.gate_up, experts.down]
    return packed


def _to_panels(module: Any, pages: HugePages) -> PackedExperts | None:
    if type(module).__name__ not in PLAIN_EXPERTS or not is_of_transformers(module):
        return None
    activation = ACTIVATIONS.get(type(module.act_fn))
    if activation is None or not can_pack_experts(module.gate_up_proj, module.down_proj):
        return None
    return PackedExperts(module.gate_up_proj, module.down_proj, activation, pages)
