"""Adapters read by the server's own loader, so that nothing is trained on what could not be served."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.lora_loader import LoadPolicy, load_lora_weights
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.training.frozen_base import FrozenBase


def read_adapter(directory: Path, base: FrozenBase, *, allow_base_mismatch: bool = False) -> LoRAWeights:
    """The adapter's weights in float32. Raises ArtifactError as the server does."""
    policy = LoadPolicy(dtype=torch.float32, max_rank=sys.maxsize, allow_base_mismatch=allow_base_mismatch)
    with open_directory(directory) as opened:
        return load_lora_weights(
            opened,
            base.modules,
            policy=policy,
            budget_bytes=sys.maxsize,
            base_weight=lambda path: _tensor_of(base, path, "weight"),
            base_bias=lambda path: _tensor_of(base, path, "bias"),
        )


def _tensor_of(base: FrozenBase, path: str, name: str) -> Tensor:
    tensor = getattr(base.model.get_submodule(path), name)
    assert isinstance(tensor, Tensor)
    return tensor
