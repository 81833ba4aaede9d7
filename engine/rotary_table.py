"""The cosines and sines of all positions, looked up instead of computed anew in every step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusionserve.engine.layer_form import RotaryForm
from fusionserve.kernels.rotation import Angles

_POSITIONS_AT_ONCE = 4096  # computing takes several times what is kept


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
        like = torch.empty(0, dtype=dtype, device=device)
        some = torch.split(torch.arange(max_positions, device=device), _POSITIONS_AT_ONCE)
        self._cos, self._sin = (
            part.new_empty(max_positions, part.shape[1])
            for part in _computed(embedding, like, some[0], rotation)
        )
        for positions in some:
            cos, sin = _computed(embedding, like, positions, rotation)
            self._cos.index_copy_(0, positions, cos)
            self._sin.index_copy_(0, positions, sin)

    def angles(self, positions: Tensor) -> Angles:
        """Those of positions [num_tokens]."""
        cos, sin = (table.index_select(0, positions).float() for table in (self._cos, self._sin))
        return Angles(cos, sin, self._by_neighbours)


def _computed(
    embedding: nn.Module, like: Tensor, positions: Tensor, rotation: RotaryForm
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [num_positions, dim] of positions, in the type of `like`."""
    options = {"layer_type": rotation.layer_type} if rotation.layer_type else {}
    cos, sin = (part[0] for part in embedding(like, position_ids=positions[None], **options))
    if rotation.has_neighbours:
        cos, sin = (part[:, ::2].repeat(1, 2) for part in (cos, sin))
    return cos, sin
