"""One loaded version of a fusion: its identity, its folded weights, and the adapters it keeps loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusionserve.adapters.adapter import Adapter
from fusionserve.adapters.resident import RowPiece
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.folded import FoldedFusion


@dataclass(frozen=True, slots=True, eq=False)
class FusionContent:
    """What a load from disk gives: the folded fusion and the members it leases, in its order."""

    folded: FoldedFusion
    members: tuple[Adapter, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its own tensors; the members' are counted with the members."""
        return self.folded.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Fusion:
    """Immutable; `uid` is minted per load, from the same numbers as the adapters'. `version` grows per name."""

    uid: int
    name: str
    version: int
    content: FusionContent
    load_time_s: float  # seconds since the epoch

    @property
    def config(self) -> FusionConfig:
        """What it is made of."""
        return self.content.folded.config

    @property
    def members(self) -> tuple[Adapter, ...]:
        """Its members, loaded as long as it is."""
        return self.content.members

    @property
    def num_rows(self) -> int:
        """Rank rows it takes in the pool."""
        return self.content.folded.num_rows

    @property
    def digest(self) -> str:
        """sha256 of the weights file, in hex."""
        return self.content.folded.digest

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the host, without its members."""
        return self.content.nbytes

    def pieces(self, path: str) -> Sequence[RowPiece]:
        """Its rows in the module at `path`."""
        return self.content.folded.pieces(path)
