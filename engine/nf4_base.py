"""What serving a base in NF4 adds to loading it: what is refused, and how it lies in memory afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fusionserve.adapters.nf4 import (
    NONE,
    compute_in_float32,
    nf4_modules,
    quantization_options,
    repack,
)
from fusionserve.engine.loading_memory import let_go_of_files
from fusionserve.errors import StartupError


def load_options(quantize: str, config: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` is to be told. Raises StartupError if this cannot be had, or not for this checkpoint."""
    if quantize == NONE:
        return {}
    try:
        options = quantization_options(quantize, config)
    except (ImportError, ValueError) as error:
        raise StartupError(str(error), reason="QUANTIZATION_UNAVAILABLE") from error
    if getattr(config, "quantization_config", None) is not None:
        raise StartupError(
            f"this checkpoint is quantized already, so it cannot become {quantize}: take the original one",
            reason="QUANTIZATION_UNAVAILABLE",
        )
    return {**options, "device_map": {"": "cpu"}}  # else a GPU would be chosen, for the quantized base alone


def settle(model: PreTrainedModel) -> None:
    """Fixes how a base just loaded computes, so that no request changes it, and frees the memory that loading took.

    Raises StartupError if nothing in it could be quantized.
    """
    modules = nf4_modules(model)
    if not modules:
        raise StartupError(
            f"the architecture {type(model).__name__} has no linear modules that can be quantized: "
            "their inputs must be a multiple of 64",
            reason="QUANTIZATION_UNAVAILABLE",
        )
    if model.dtype == torch.float32:
        compute_in_float32(model)
    else:
        repack(model)
    let_go_of_files(model, converted=map(_weight, modules.values()))


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
