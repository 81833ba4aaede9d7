"""The tables of a graph in one piece of memory: what they hold, and that one copy carries them."""

from __future__ import annotations

from dataclasses import fields

import torch
from device_kernels import DEVICE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusionserve.kernels.device.rank_items import BLOCK, RankTables
from fusionserve.kernels.device.table_image import TableImage


def make_tables(num_items: int, num_groups: int, num_fused: int, *, filled_with: int) -> RankTables:
    def full(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, filled_with, dtype=dtype)

    return RankTables(
        tiles=full(num_items, 4),
        items=full(num_items, 6),
        given=full(num_items, BLOCK, BLOCK, dtype=torch.float32),
        groups=full(num_groups, 5),
        fused=full(num_fused, 4, dtype=torch.int64),
        member_of_row=full(3 * num_groups),
        attends=full(num_groups, 7),
        present=full(num_groups, 7, dtype=torch.int64),
    )


class CopiesTo(TorchDispatchMode):
    """Counts what writes to a tensor's memory in its block."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target, self.num_writes = target, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            self.num_writes += args[0].untyped_storage().data_ptr() == self._target.data_ptr()
        return func(*args, **(kwargs or {}))


def test_tables_are_filled_and_cleared_behind_by_one_copy() -> None:
    image = TableImage.zeros(make_tables(5, 3, 6, filled_with=0), DEVICE)
    image.fill(make_tables(4, 2, 5, filled_with=3))
    small = make_tables(2, 1, 4, filled_with=8)
    with CopiesTo(image.memory) as copies:
        image.fill(small)
    assert copies.num_writes == 1
    for each in fields(RankTables):
        found, own = getattr(image.tables, each.name).cpu(), getattr(small, each.name)
        assert found.dtype is own.dtype and torch.equal(found[: len(own)], own)
        behind = found[len(own) :]
        if each.name == "fused":
            assert (behind[:, 0] == -1).all()
            behind = behind[:, 1:]
        assert not behind.any()


def test_tables_begin_where_kernels_need_not_be_compiled_anew() -> None:
    image = TableImage.zeros(make_tables(5, 3, 6, filled_with=0), DEVICE)
    parts = [getattr(image.tables, each.name) for each in fields(RankTables)]
    assert not any(part.data_ptr() % 16 for part in parts)
    nothing = TableImage.zeros(make_tables(1, 0, 0, filled_with=0), DEVICE)
    assert nothing.tables.fused.shape == (0, 4) and nothing.tables.present.shape == (0, 7)
