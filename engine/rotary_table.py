"""The cosines and sines of all positions, looked up instead of computed anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusionserve.engine.layer_form import RotaryForm
from fusionserve.kernels.rotation import Angles


class RotaryTable:
    """Stands in for a model's rotary embedding, whose angles must not change with the length of the context.

    `rotation` is which of its rotations, as `LayerForm` has it; without one nothing is turned. Angles are what the
    model computes for activations of `dtype`, held as it has them and widened when they are looked up.
    """

    def __init__(
        self,
        embedding: nn.Module | None,
        max_positions: int,
        dtype: torch.dtype,
        rotation: RotaryForm | None,
        device: torch.device,
    ) -> None:
        self._by_neighbours = rotation is not None and rotation.by_neighbours
        if embedding is None or rotation is None:
            self._cos = self._sin = torch.empty(max_positions, 0, device=device)
            return
        positions = torch.arange(max_positions, device=device)[None]
        options = {"layer_type": rotation.layer_type} if rotation.layer_type else {}
        cos, sin = embedding(torch.empty(0, dtype=dtype, device=device), position_ids=positions, **options)
        tables = (table[0] for table in (cos, sin))  # [max_positions, dim]
        if rotation.has_neighbours:
            tables = (table[:, ::2].repeat(1, 2) for table in tables)
        self._cos, self._sin = (table.contiguous() for table in tables)

    def angles(self, positions: Tensor) -> Angles:
        """Those of positions [num_tokens]."""
        cos, sin = (table.index_select(0, positions).float() for table in (self._cos, self._sin))
        return Angles(cos, sin, self._by_neighbours)
