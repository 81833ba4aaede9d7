"""The cosines and sines of all positions, looked up instead of computed anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryTable(nn.Module):
    """Stands in for a model's rotary embedding, whose angles must not change with the length of the context."""

    def __init__(self, embedding: nn.Module, max_positions: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = next(embedding.buffers()).device
        positions = torch.arange(max_positions, device=device)[None]
        cos, sin = embedding(torch.empty(0, dtype=dtype, device=device), position_ids=positions)
        self.cos, self.sin = cos[0].contiguous(), sin[0].contiguous()  # [max_positions, dim]

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, num_tokens, dim] of position_ids [1, num_tokens]."""
        return self.cos.index_select(0, position_ids[0])[None], self.sin.index_select(0, position_ids[0])[
            None
        ]
