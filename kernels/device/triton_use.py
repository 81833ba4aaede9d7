"""When the Triton kernels are used, and in what numbers they multiply."""

from __future__ import annotations

import os

import torch
from torch import Tensor

# For tests without a GPU: CPU tensors too are computed by these kernels, which Triton interprets (TRITON_INTERPRET=1).
INTERPRETS = os.environ.get("FUSIONSERVE_TRITON") == "interpret"


def uses_triton(device: torch.device) -> bool:
    """True if tensors of this device are computed by the kernels of this package."""
    return device.type == "cuda" or (INTERPRETS and device.type == "cpu")


def dot_in_float32(like: Tensor) -> bool:
    """True if products are to be of float32 numbers: for those, and because the interpreter has none of bfloat16."""
    return like.dtype is torch.float32 or like.device.type == "cpu"


def num_programs(size: int, block: int) -> int:
    """Programs that cover `size` numbers, `block` each."""
    return -(-size // block)


def num_lanes(size: int, least: int = 1) -> int:
    """The power of two that holds `size`, of which Triton makes its blocks."""
    return max(least, 1 << (size - 1).bit_length())
