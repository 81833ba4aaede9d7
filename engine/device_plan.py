"""Plans the adapted tokens of a step for the kernels of one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from weakref import WeakKeyDictionary

import torch

from fusionserve.adapters.base_modules import BaseModules
from fusionserve.adapters.fused_tokens import FusedRange
from fusionserve.adapters.fusion_rows import FusionRows
from fusionserve.adapters.rank_tables import make_tables
from fusionserve.adapters.row_plan import AdaptedTokens
from fusionserve.kernels.device.rank_items import BLOCK, RankItems, RankTables
from fusionserve.kernels.device.table_image import TableImage
from fusionserve.kernels.device.triton_use import num_lanes
from fusionserve.kernels.host_copy import sent, to_device


class DevicePlanner:
    """Makes the items of a step on the device, for modules of one base."""

    def __init__(self, modules: BaseModules, like: torch.Tensor) -> None:
        self._like = like
        self._module_ids = {path: index for index, path in enumerate(modules.by_path)}
        self._head = None if modules.lm_head is None else modules.lm_head.path
        self._attentions: WeakKeyDictionary[FusionRows, tuple[tuple[str, ...], torch.Tensor]] = (
            WeakKeyDictionary()
        )

    def items(self, adapted: Sequence[AdaptedTokens], fused: Sequence[FusedRange]) -> RankItems | None:
        """The items of adapted tokens, in ascending order, and of fused ones; None if there are neither."""
        tables = self.tables(adapted, fused)
        most_members = max((tokens.rows.num_members for tokens in fused), default=0)
        if tables is None:
            return None
        return self.items_of(self._to_device(tables), num_lanes(most_members) if fused else 0)

    def tables(self, adapted: Sequence[AdaptedTokens], fused: Sequence[FusedRange]) -> RankTables | None:
        """The tables of the items, on the host."""
        return make_tables(adapted, fused, self._module_ids) if adapted or fused else None

    def empty_tables(
        self, *, num_items: int, num_groups: int, num_fused: int, num_member_rows: int
    ) -> TableImage:
        """Tables of these sizes on the device that hold nothing; as many tiles as items."""
        num_modules = len(self._module_ids)
        tables = RankTables(
            tiles=torch.zeros(num_items, 4, dtype=torch.int32),
            items=torch.zeros(num_items, 6, dtype=torch.int32),
            given=torch.zeros(num_items, BLOCK, BLOCK),
            groups=torch.zeros(num_groups, 5, dtype=torch.int32),
            fused=torch.full((num_fused, 4), -1, dtype=torch.int64),
            member_of_row=torch.zeros(num_member_rows, dtype=torch.int32),
            attends=torch.zeros(num_groups, num_modules, dtype=torch.int32),
            present=torch.zeros(num_groups, num_modules, dtype=torch.int64),
        )
        image = TableImage.zeros(tables, self._like.device)
        image.fill(tables)
        return image

    def items_of(self, tables: RankTables, fusion_width: int) -> RankItems:
        """The items of tables on the device."""
        return RankItems(tables, self._like, module_ids=self._module_ids, fusion_width=fusion_width)

    def collect_weights(self, fused: Sequence[FusedRange], items: RankItems) -> None:
        """Gives the fused tokens that the items were made of their fusion weights, as the forward pass found them."""
        start = 0
        for tokens in fused:
            end = start + tokens.end - tokens.start
            tokens.attentions, ids = self._attentions_of(tokens.rows)
            if tokens.attentions:
                tokens.weights = items.weights[:, start:end].index_select(0, ids)
            start = end

    def _attentions_of(self, rows: FusionRows) -> tuple[tuple[str, ...], torch.Tensor]:
        """Paths and ids of a fusion's attentions, without the LM head's, which sees other tokens than the layers do."""
        if rows not in self._attentions:
            found = [path for path, module in rows.modules.items() if module.has_attention]
            paths = tuple(path for path in found if path != self._head)
            ids = to_device([self._module_ids[path] for path in paths], torch.long, self._like.device)
            self._attentions[rows] = paths, ids
        return self._attentions[rows]

    def _to_device(self, tables: RankTables) -> RankTables:
        device = self._like.device
        return RankTables(**{each.name: sent(getattr(tables, each.name), device) for each in fields(tables)})
