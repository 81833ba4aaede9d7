"""What may live in the adapter pool: anything that takes a fixed number of rank rows in every module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class RowPiece:
    """Neighbouring rank rows of one module, from `offset` in the resident's range; no `expand` means zeros."""

    offset: int
    shrink: Tensor  # [rows, d_in]
    expand: Tensor | None  # [rows, d_out]
    shrink_bias: Tensor | None = None  # [rows]


def even(num_rows: int) -> int:
    """So many rows, or one more."""
    return num_rows + num_rows % 2


class Resident(Protocol):
    """An adapter or a fusion, immutable; `uid` is minted per load and never reused."""

    @property
    def uid(self) -> int:
        """Its identity among all that was ever loaded."""

    @property
    def name(self) -> str:
        """The user's name for it."""

    @property
    def num_rows(self) -> int:
        """Rank rows it takes, the same range in every module; an even number, because kernels take them by twos."""

    def pieces(self, path: str) -> Sequence[RowPiece]:
        """Its rows in the module at `path`; rows that no piece covers are zero."""
