"""A written fusion back on its base, to measure what it costs and what it attends to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fusionserve.adapters.artifact_directory import open_directory
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.errors import ArtifactError
from fusionserve.fusion.loader import (
    check_base,
    check_members,
    in_call_order,
    read_fusion_config,
    read_fusion_params,
)
from fusionserve.fusion.unfolded import UnfoldedFusion
from fusionserve.training.adapter_reading import read_adapter
from fusionserve.training.evaluation import HeldOutLoss, evaluate_loss
from fusionserve.training.frozen_base import FrozenBase
from fusionserve.training.fusion_training import fusion_in_place
from fusionserve.training.fusion_watch import FusionWatch
from fusionserve.training.rows import Row
from fusionserve.training.training_summary import FusionStatistics


@dataclass(frozen=True, slots=True)
class PlacedFusion:
    """A fusion on its base, unfolded."""

    base: FrozenBase
    fusion: UnfoldedFusion
    names: tuple[str, ...]  # of the weights

    def measure(self, rows: Sequence[Row], batch_rows: int = 8) -> tuple[HeldOutLoss, FusionStatistics]:
        """The loss on `rows`, and the weights that came to it."""
        watch = FusionWatch(self.fusion, self.names)
        return evaluate_loss(self.base.model, rows, batch_rows, watch.observe), watch.take()


@contextmanager
def placed_fusion(
    directory: Path, base: FrozenBase, members: Mapping[str, Path], *, allow_base_mismatch: bool = False
) -> Iterator[PlacedFusion]:
    """The fusion in `directory` on `base` for the block; `members` says where its adapters are.

    Raises ArtifactError if the server would refuse it.
    """
    with open_directory(directory) as opened:
        config = read_fusion_config(opened)
        check_base(config, base.modules)
        config = in_call_order(config, base.modules)
        params, _ = read_fusion_params(opened, config, base.modules)
    weights = [
        _read_member(member.name, members, base, allow_base_mismatch=allow_base_mismatch)
        for member in config.members
    ]
    check_members(config, weights, base.modules)
    with fusion_in_place(base, config, params, weights) as fusion:
        yield PlacedFusion(base, fusion, config.weight_names)


def _read_member(
    name: str, members: Mapping[str, Path], base: FrozenBase, *, allow_base_mismatch: bool
) -> LoRAWeights:
    """Among several adapters the reason alone would not tell which one it is about."""
    try:
        return read_adapter(members[name], base, allow_base_mismatch=allow_base_mismatch)
    except ArtifactError as error:
        raise ArtifactError(
            f"member {name}: {error.message}", reason=error.reason, metadata=error.metadata
        ) from error
