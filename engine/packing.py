"""Packs the base's weights for the native product, one module after the other, so that none is held twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fusionserve.adapters.base_modules import BaseModules, ModuleKind
from fusionserve.engine.loading_memory import let_go_of_files, little_garbage
from fusionserve.kernels.packed_linear import PackedEmbedding, PackedLinear, can_pack, pack


@torch.no_grad()
def pack_linear_modules(model: PreTrainedModel, modules: BaseModules) -> int:
    """Puts a PackedLinear in place of every plain linear module that there is a packed product for; returns how many.

    An embedding tied to the LM head reads the head's packed weight. Other holders of a packed weight would keep it, so
    the head stays as it is if the embedding is of a kind that cannot.
    """
    embedding = model.get_input_embeddings()
    packed_weights = []
    with little_garbage():
        for path, module in modules.by_path.items():
            linear: Any = model.get_submodule(path)
            shares = module.kind is ModuleKind.LM_HEAD and modules.is_tied
            if not _can_pack(linear) or (shares and type(embedding) is not nn.Embedding):
                continue
            packed = PackedLinear(pack(linear.weight), linear.bias)
            _set(model, path, packed)
            packed_weights.append(packed.packed)
            if shares:
                model.set_input_embeddings(PackedEmbedding(packed))
    if packed_weights:
        let_go_of_files(model, converted=packed_weights)
    return len(packed_weights)


def _can_pack(module: nn.Module) -> bool:
    return type(module) is nn.Linear and can_pack(module.weight)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
