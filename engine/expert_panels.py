"""Brings the weights of routed experts into panels, where the CPU has the product for them, packed or in few bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusionserve.engine.layer_families import ACTIVATIONS
from fusionserve.engine.layer_form import is_of_transformers
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.panel_experts import PanelExperts, can_be_in_panels

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
def bring_experts_into_panels(
    model: nn.Module, bits: int | None, device: torch.device, pages: HugePages
) -> list[Tensor]:
    """Puts PanelExperts in place of all that they can stand in for; returns what holds their weights.

    With `bits`, 8 or 4, weights are quantized, else packed as they are. Those of a model that is to compute on a GPU
    stay as they are, also while it is still on the host.
    """
    storage: list[Tensor] = []
    if device.type != "cpu":
        return storage
    for module in list(model.modules()):
        for name, child in module.named_children():
            experts = _to_panels(child, bits, pages)
            if experts is not None:
                setattr(module, name, experts)
                tensors = (*experts.gate_up.storage(), *experts.down.storage())
                storage += [tensor for tensor in tensors if tensor is not None]
    return storage


def _to_panels(module: Any, bits: int | None, pages: HugePages) -> PanelExperts | None:
    if type(module).__name__ not in PLAIN_EXPERTS or not is_of_transformers(module):
        return None
    activation, weights = ACTIVATIONS.get(type(module.act_fn)), (module.gate_up_proj, module.down_proj)
    if activation is None or not can_be_in_panels(*weights, bits):
        return None
    return PanelExperts(*weights, activation, bits, pages)
