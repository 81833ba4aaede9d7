"""Brings the weights of routed experts into panels, where the CPU has the product for them, packed or in few bits.

Their classes are known by name, and code under a name may change with a release of transformers. So the first layer of
a class is compared with transformers' own on a few tokens; if they differ, all of that class stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from fusionserve.engine.layer_families import ACTIVATIONS
from fusionserve.engine.layer_form import is_of_transformers
from fusionserve.kernels.activations import Activation
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.panel_experts import PanelExperts, can_be_in_panels

logger = logging.getLogger(__name__)

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
_PROBED_EXPERTS, _PROBED_TOKENS, _PROBED_CHOICES = 4, 5, 2
_MAX_ERROR = 1e-4  # relative, in float32
_MAX_ROUNDINGS = 8  # in types of 16 bits, where transformers rounds between operations


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
    is_alike: dict[type[nn.Module], bool] = {}
    for parent, name, experts in _find_experts(model, bits):
        activation = ACTIVATIONS[type(experts.act_fn)]
        if type(experts) not in is_alike:
            is_alike[type(experts)] = _is_alike(experts, activation)
        if is_alike[type(experts)]:
            panels = PanelExperts(experts.gate_up_proj, experts.down_proj, activation, bits, pages)
            setattr(parent, name, panels)
            tensors = (*panels.gate_up.storage(), *panels.down.storage())
            storage += [tensor for tensor in tensors if tensor is not None]
    return storage


def _find_experts(model: nn.Module, bits: int | None) -> list[tuple[nn.Module, str, Any]]:
    """Those that PanelExperts can stand in for, each with its parent and its name there."""
    found = ((parent, *child) for parent in model.modules() for child in parent.named_children())
    return [(parent, name, child) for parent, name, child in found if _can_be_in_panels(child, bits)]


def _can_be_in_panels(module: Any, bits: int | None) -> bool:
    if type(module).__name__ not in PLAIN_EXPERTS or not is_of_transformers(module):
        return False
    return type(module.act_fn) in ACTIVATIONS and can_be_in_panels(
        module.gate_up_proj, module.down_proj, bits
    )


def _is_alike(experts: Any, activation: Activation) -> bool:
    """True if a few tokens get the same from some of the experts as from these packed in full; else warns."""
    gate_up, down = experts.gate_up_proj[:_PROBED_EXPERTS], experts.down_proj[:_PROBED_EXPERTS]
    num_experts, hidden, _ = down.shape
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(_PROBED_TOKENS, num_experts, generator=generator)
    shares, chosen = scores.topk(min(_PROBED_CHOICES, num_experts))
    x = torch.randn(_PROBED_TOKENS, hidden, generator=generator).to(down.dtype)
    shares = shares.to(x.dtype)
    expected = experts(x, chosen, shares).float()
    found = PanelExperts(gate_up, down, activation)(x, chosen, shares).float()
    most = max(_MAX_ERROR, _MAX_ROUNDINGS * torch.finfo(x.dtype).eps)
    is_alike = bool((found - expected).norm() <= most * expected.norm())  # of NaN it is not
    if not is_alike:
        logger.warning(
            "the experts (%s) stay as transformers computes them, slower and in full: their code is not the known one",
            type(experts).__name__,
        )
    return is_alike
