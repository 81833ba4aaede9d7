"""The tables of a step's adapted tokens in one piece of memory, which reaches a device by one copy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from fusionserve.kernels.device.rank_items import RankTables

_ALIGNMENT = 16  # Triton compiles kernels anew for addresses that are no multiple of it


@dataclass(frozen=True, slots=True)
class TableImage:
    """Tables that are parts of `memory`, uint8 [bytes]."""

    memory: Tensor
    tables: RankTables

    @classmethod
    def zeros(
        cls, like: RankTables, device: torch.device | None = None, *, pin_memory: bool = False
    ) -> TableImage:
        """Tables of these sizes and types."""
        tables = {each.name: getattr(like, each.name) for each in fields(RankTables)}
        rooms = [-(-table.nbytes // _ALIGNMENT) * _ALIGNMENT for table in tables.values()]
        starts = accumulate(rooms, initial=0)
        memory = torch.zeros(sum(rooms), dtype=torch.uint8, device=device, pin_memory=pin_memory)
        parts = {
            name: memory[start : start + table.nbytes].view(table.dtype).view(table.shape)
            for (name, table), start in zip(tables.items(), starts, strict=False)
        }
        return cls(memory, RankTables(**parts))

    def fill(self, tables: RankTables) -> None:
        """Copies tables of the host, at most as large; behind them is nothing. Nobody waits for it."""
        image = TableImage.zeros(self.tables, pin_memory=self.memory.is_cuda)
        for each in fields(RankTables):
            table = getattr(tables, each.name)
            getattr(image.tables, each.name)[: len(table)] = table
        image.tables.fused[len(tables.fused) :, 0] = -1
        self.memory.copy_(image.memory, non_blocking=True)
