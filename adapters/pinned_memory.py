"""Host memory that a GPU copies from while the host goes on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned_memory(num_bytes: int) -> Tensor:
    """uint8 [num_bytes], as it comes."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


def pinned_bytes(num_bytes: int) -> int:
    """What so much takes of the host: torch pins powers of two."""
    return 1 << (num_bytes - 1).bit_length() if num_bytes else 0


def pinned_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors of one type, side by side, so that the sum is rounded up and not each."""
    memory = pinned_memory(sum(tensor.nbytes for tensor in tensors))
    copies, start = [], 0
    for tensor in tensors:
        assert tensor.dtype is tensors[0].dtype
        copy = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(copy.copy_(tensor))
        start += tensor.nbytes
    return copies
