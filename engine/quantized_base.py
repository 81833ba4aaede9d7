"""What holding a base's weights in fewer bits adds to loading it: what is refused, and how NF4 lies in memory.

NF4 is quantized by bitsandbytes while the checkpoint is read; 8 and 4 bits as its weights are brought into panels.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fusionserve.adapters.base_checkpoint import check_not_quantized
from fusionserve.adapters.nf4 import (
    NF4,
    NONE,
    compute_in_float32,
    nf4_modules,
    quantization_options,
    repack,
)
from fusionserve.engine.loading_memory import let_go_of_files
from fusionserve.errors import StartupError
from fusionserve.kernels.device.triton_use import uses_triton
from fusionserve.kernels.quantized_linear import GROUP, has_quantized_product

BITS = {"int8": 8, "int4": 4}

logger = logging.getLogger(__name__)


def load_options(quantize: str, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is to be told. Raises StartupError if this cannot be had, or not for this checkpoint."""
    try:
        check_not_quantized(config)
        if quantize == NONE or quantize in BITS:
            return {}
        options = quantization_options(quantize, config)
    except (ImportError, ValueError) as error:
        raise StartupError(str(error), reason="QUANTIZATION_UNAVAILABLE") from error
    return {
        **options,
        "device_map": {"": str(device)},
    }  # else a GPU would be chosen, for the quantized base alone


def settle(model: PreTrainedModel, quantize: str) -> None:
    """Fixes how an NF4 base just loaded computes, so that no request changes it; frees what loading took.

    Raises StartupError if nothing in it could be quantized.
    """
    if quantize != NF4:
        return
    modules = nf4_modules(model)
    if not modules:
        raise _nothing_to_quantize(model, 64)
    if model.dtype == torch.float32:
        compute_in_float32(model)
    elif model.device.type == "cpu":
        repack(model)
    let_go_of_files(model, converted=map(_weight, modules.values()))


def check_panels(model: PreTrainedModel, num_panels: int, quantize: str) -> None:
    """Raises StartupError if nothing could be quantized; warns if it is a processor that has no product for it."""
    if quantize not in BITS:
        return
    if num_panels == 0:
        raise _nothing_to_quantize(model, GROUP)
    if not uses_triton(model.device) and not has_quantized_product():
        what = "a compiler, and AVX2 or AVX-512 VNNI"
        logger.warning("computing with %s weights many times slower: it needs %s", quantize, what)


def _nothing_to_quantize(model: PreTrainedModel, multiple: int) -> StartupError:
    return StartupError(
        f"the architecture {type(model).__name__} has no linear modules that can be quantized: "
        f"their inputs must be a multiple of {multiple}",
        reason="QUANTIZATION_UNAVAILABLE",
    )


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight
