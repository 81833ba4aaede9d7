"""One loaded version of an adapter: its identity and its weights on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.adapters.resident import RowPiece, even


@dataclass(frozen=True, slots=True, eq=False)
class AdapterContent:
    """What a load from disk gives: the checked weights, and DoRA's column scales, computed from them and the base."""

    weights: LoRAWeights
    column_scales: Mapping[str, Tensor] = field(default_factory=dict)  # by module path, [d_out], float32

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the host."""
        return self.weights.nbytes + sum(scale.nbytes for scale in self.column_scales.values())


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """Immutable; `uid` is minted per load and never reused, so it may key caches. `version` grows per name."""

    uid: int
    name: str
    version: int
    content: AdapterContent
    load_time_s: float  # seconds since the epoch

    @property
    def weights(self) -> LoRAWeights:
        """Rank rows and replacements by module path."""
        return self.content.weights

    @property
    def num_rows(self) -> int:
        """Rank rows it takes in the pool, the same range in every module."""
        return even(self.weights.max_rank)

    def pieces(self, path: str) -> Sequence[RowPiece]:
        """Its rows in the module at `path`."""
        lora = self.weights.modules.get(path)
        return () if lora is None else (RowPiece(0, lora.shrink, lora.expand, lora.shrink_bias),)

    @property
    def nbytes(self) -> int:
        """Bytes it takes on the host."""
        return self.content.nbytes

    @property
    def digest(self) -> str:
        """sha256 of the weights file, in hex."""
        return self.weights.digest
