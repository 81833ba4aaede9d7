"""Chooses where the model computes."""

from __future__ import annotations

import torch

from fusionserve.errors import StartupError


def find_device(name: str) -> torch.device:
    """The device called "cpu" or "cuda", or for "auto" a GPU if there is one; its kernels must be there, too.

    Raises StartupError with DEVICE_UNAVAILABLE.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise StartupError("there is no GPU that torch can use here", reason="DEVICE_UNAVAILABLE")
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise StartupError(
            "serving on a GPU needs Triton: pip install 'fusionserve[gpu]'", reason="DEVICE_UNAVAILABLE"
        ) from error
    return torch.device("cuda", torch.cuda.current_device())
