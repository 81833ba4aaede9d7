"""What serving a base in NF4 adds to loading it: what is refused, and how it lies in memory afterwards."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from fusionserve.adapters.nf4 import (
    NONE,
    compute_in_float32,
    nf4_modules,
    quantization_options,
    repack,
)
from fusionserve.errors import StartupError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's names for them
_MOST_KEPT = 32 << 20


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


@contextmanager
def little_garbage() -> Iterator[None]:
    """Lets weights that are freed while a base is quantized go back to the system at once.

    Else glibc soon keeps blocks of up to 32 MiB for later, and several times the size of the base lies about in holes.
    That is the size at which it stands behind the block, as it does in any process that has freed large blocks.
    """
    _glibc("mallopt", _MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        _glibc("mallopt", _MMAP_THRESHOLD, _MOST_KEPT)
        _glibc("mallopt", _TRIM_THRESHOLD, 2 * _MOST_KEPT)


def settle(model: PreTrainedModel) -> None:
    """Fixes how a base just loaded computes, so that no request changes it, and frees the memory that loading took.

    Raises StartupError if nothing in it could be quantized.
    """
    if not nf4_modules(model):
        raise StartupError(
            f"the architecture {type(model).__name__} has no linear modules that can be quantized: "
            "their inputs must be a multiple of 64",
            reason="QUANTIZATION_UNAVAILABLE",
        )
    if model.dtype == torch.float32:
        compute_in_float32(model)
    else:
        repack(model)
    _let_go_of_files(model)
    _return_free_memory()


@torch.no_grad()
def _let_go_of_files(model: PreTrainedModel) -> None:
    """Copies what was not quantized: a view of the mapped checkpoint would keep all of that in memory."""
    for parameter in model.parameters():
        if getattr(parameter, "quant_state", None) is None:
            parameter.data = parameter.data.clone()


def _return_free_memory() -> None:
    """Quantizing leaves holes of the size of whole weights in the heap, which glibc keeps unless it is asked."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> None:
    """Calls a function that only glibc has, where there is glibc."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if found is not None:
        found(*arguments)
