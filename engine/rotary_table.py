"""The cosines and sines of all positions, looked up instead of computed anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable:
    """Stands in for a model's rotary embedding, whose angles must not change with the length of the context."""

    def __init__(self, embedding: nn.Module, max_positions: int, dtype: torch.dtype) -> None:
        device = next(embedding.buffers()).device
        positions = torch.arange(max_positions, device=device)[None]
        cos, sin = embedding(torch.empty(0, dtype=dtype, device=device), position_ids=positions)
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()  # [max_positions, dim]

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [num_tokens, dim] of positions [num_tokens]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)
