"""The rank rows of modules that share an input, as the kernels of `rank_items.py` take them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TypeVar

import torch

from fusionserve.kernels.segments import PartRows

MAX_PLACES = 3  # modules of a group

_T = TypeVar("_T")


def three(values: Sequence[_T]) -> Sequence[_T]:
    """Filled up with the first: a launch names three of everything."""
    return [*values, *[values[0]] * (MAX_PLACES - len(values))]


class GroupParts:
    """Modules that share an input: their rank rows, and the outputs that these are added to."""

    def __init__(self, parts: Sequence[PartRows], module_ids: Sequence[int]) -> None:
        assert 1 <= len(parts) <= MAX_PLACES
        self._parts = tuple(parts)
        self.num_places = len(parts)
        self.d_in = parts[0].shrink.shape[1]
        self.d_outs = [part.expand.shape[1] for part in parts]
        like = parts[0].shrink
        self.shrink = [part.shrink for part in parts]
        self.bias = [like.new_zeros(len(part.shrink)) if part.bias is None else part.bias for part in parts]
        self.expand = [part.expand for part in parts]
        self.module_ids = torch.tensor(module_ids, dtype=torch.int32, device=like.device)

    def are_of(self, parts: Sequence[PartRows]) -> bool:
        """True if they were made of these very rows."""
        return len(self._parts) == len(parts) and all(map(operator.is_, self._parts, parts))
