"""A fusion as it is served: the rank rows it takes in the adapter pool, its members' rows among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fusionserve.adapters.fusion_rows import FusionModule, FusionRows
from fusionserve.adapters.lora_weights import LoRAWeights
from fusionserve.adapters.pinned_memory import pinned_bytes, pinned_together
from fusionserve.adapters.resident import RowPiece
from fusionserve.fusion.config import FusionConfig
from fusionserve.fusion.fold import ScoreRows, fold_attention, fold_value
from fusionserve.fusion.params import FusionParams


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: the cached properties need a place
class FoldedFusion:
    """The folded weights. In the pool come first the rows of all members, [A_i; C_i], then those of the scores.

    `members` are referred to and not copied; they must stay loaded as long as this.
    """

    config: FusionConfig
    digest: str  # sha256 of the weights file
    members: tuple[LoRAWeights, ...]
    scores: Mapping[str, ScoreRows]  # by the path of each attention
    values: Mapping[
        str, tuple[Tensor | None, ...]
    ]  # by path, C_i^T [rank, d_out] of each member; empty without V
    rows: FusionRows
    is_pinned: bool = False

    @property
    def num_rows(self) -> int:
        """Rank rows it takes in the pool."""
        return self.rows.num_rows

    @cached_property
    def nbytes(self) -> int:
        """Bytes that its own tensors take on the host; the members' are counted with the members."""
        num_bytes = sum(rows.nbytes for rows in self.own_rows())
        return pinned_bytes(num_bytes) if self.is_pinned else num_bytes

    def own_rows(self) -> Iterator[Tensor]:
        """Its own tensors: what is folded, in the type that is served."""
        for rows in self.scores.values():
            yield from (rows.shrink, rows.shrink_bias)
        for of_members in self.values.values():
            yield from (rows for rows in of_members if rows is not None)

    def pinned(self) -> FoldedFusion:
        """The same with its own rows in pinned memory; the members' are the members' business."""
        copies = iter(pinned_together(list(self.own_rows())))
        scores = {path: ScoreRows(next(copies), next(copies)) for path in self.scores}
        values = {
            path: tuple(None if rows is None else next(copies) for rows in of_members)
            for path, of_members in self.values.items()
        }
        return replace(self, scores=scores, values=values, is_pinned=True)

    def pieces(self, path: str) -> Sequence[RowPiece]:
        """What the pool holds for the module at `path`."""
        if path not in self.rows.modules:
            return ()
        pieces, start = [], 0
        folded = self.values.get(path, (None,) * len(self.members))
        for member, expand in zip(self.members, folded, strict=True):
            lora = member.modules.get(path)
            if lora is not None:
                pieces.append(
                    RowPiece(start, lora.shrink, lora.expand if expand is None else expand, lora.shrink_bias)
                )
            start += member.max_rank
        scores = self.scores.get(path)
        if scores is not None:
            pieces.append(RowPiece(start, scores.shrink, None, scores.shrink_bias))
        return pieces


def plan_rows(config: FusionConfig, params: FusionParams, members: Sequence[LoRAWeights]) -> FusionRows:
    """Which rows the fusion will have."""
    return FusionRows(
        row_counts=tuple(member.max_rank for member in members),
        has_member_keys=config.member_keys,
        has_base_member=config.base_member,
        modules={
            path: FusionModule(
                path in params.attentions, torch.tensor([path in member.modules for member in members])
            )
            for path in config.modules
        },
    )


def count_bytes(
    config: FusionConfig, params: FusionParams, members: Sequence[LoRAWeights], dtype: torch.dtype
) -> int:
    """What its own tensors will have."""
    num_rows = sum(member.max_rank for member in members) + (len(members) if config.member_keys else 0)
    scores = sum(num_rows * (each.query.weight.shape[1] + 1) for each in params.attentions.values())
    present = (member.modules[path] for path in params.values for member in members if path in member.modules)
    return (scores + sum(lora.expand.numel() for lora in present)) * dtype.itemsize


def fold_fusion(
    config: FusionConfig,
    digest: str,
    params: FusionParams,
    members: Sequence[LoRAWeights],
    dtype: torch.dtype,
) -> FoldedFusion:
    """Folds trained parameters over the members' weights, which are those that will be served."""
    rows = plan_rows(config, params, members)
    modules = {path: [member.modules.get(path) for member in members] for path in config.modules}
    scores = {
        path: fold_attention(attention, modules[path], rows.row_counts, config.temperature, dtype)
        for path, attention in params.attentions.items()
    }
    values = {
        path: tuple(None if lora is None else fold_value(value, lora, dtype) for lora in modules[path])
        for path, value in params.values.items()
    }
    return FoldedFusion(
        config=config, digest=digest, members=tuple(members), scores=scores, values=values, rows=rows
    )
