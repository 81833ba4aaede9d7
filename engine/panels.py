"""Brings the base's weights into panels for products of our own, module by module, so that none is held twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fusionserve.adapters.adapted_embedding import embedding_scale
from fusionserve.adapters.base_modules import BaseModules, ModuleKind
from fusionserve.adapters.routers import router_paths
from fusionserve.engine.expert_panels import bring_experts_into_panels
from fusionserve.engine.loading_memory import let_go_of_files, little_garbage
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.huge_pages import HugePages
from fusionserve.kernels.linear_product import PanelEmbedding, PanelLinear
from fusionserve.kernels.packed_linear import PackedLinear, can_pack
from fusionserve.kernels.quantized_linear import QuantizedLinear, can_quantize, quantize
from fusionserve.kernels.tiled_linear import quantize_on

_SCALED_EMBEDDINGS = {f"{family}TextScaledWordEmbedding" for family in ("Gemma", "Gemma2", "Gemma3")}
_HEAD_BITS = 8  # of a quantized LM head: all logits depend on it, and a tied embedding reads it


@torch.no_grad()
def bring_into_panels(
    model: PreTrainedModel, modules: BaseModules, bits: int | None, device: torch.device
) -> int:
    """Puts a PanelLinear in place of every linear module that there is one for; returns how many have their weights so.

    With `bits`, 8 or 4, weights are quantized, those of routers excepted, else packed as they are; on the CPU those of
    routed experts, too. An embedding tied to the LM head reads the head's panels; if it is of an unknown kind, the head
    stays as it is, because the embedding would keep the weight.
    The panels are on `device`, to which the rest of the model follows: full weights on the host never are.
    """
    embedding = model.get_input_embeddings()
    converted: list[Tensor] = []
    routers = router_paths(model)
    pages = HugePages()
    with little_garbage():
        for path, module in modules.by_path.items():
            is_head = module.kind is ModuleKind.LM_HEAD
            shares = is_head and modules.is_tied
            scale = _scale_of(embedding)
            if shares and scale is None:
                continue
            own_bits = None if path in routers else _HEAD_BITS if bits and is_head else bits
            panels = _to_panels(model.get_submodule(path), own_bits, device, pages)
            if panels is None:
                continue
            _set(model, path, panels)
            converted += [tensor for tensor in panels.storage() if tensor is not None]
            if shares and scale is not None:
                model.set_input_embeddings(PanelEmbedding(panels, scale))
    converted += bring_experts_into_panels(model, bits, device, pages)
    if bits is not None:
        model.to(device)  # type: ignore[arg-type] # its stub has lost the first argument
    if converted:
        let_go_of_files(model, converted)
    kind = PanelLinear if bits is None else QuantizedLinear
    return sum(isinstance(module, kind) for module in model.modules())


def _scale_of(embedding: Any) -> float | None:
    """What an embedding multiplies its rows by; None for one of an unknown kind."""
    is_known = type(embedding) is nn.Embedding or type(embedding).__name__ in _SCALED_EMBEDDINGS
    return embedding_scale(embedding) if is_known else None


def _to_panels(module: Any, bits: int | None, device: torch.device, pages: HugePages) -> PanelLinear | None:
    """The module in panels, or None if it is of another kind or does not divide into them."""
    if type(module) not in (nn.Linear, Conv1D):
        return None
    weight = module.weight.T if type(module) is Conv1D else module.weight
    if bits is None:
        fits = device.type == "cpu" and can_pack(weight)
        return PackedLinear(weight, module.bias, pages) if fits else None
    if not can_quantize(weight):
        return None
    if uses_triton(device):
        return quantize_on(device, weight, module.bias, bits)
    return quantize(weight, module.bias, bits, pages)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
