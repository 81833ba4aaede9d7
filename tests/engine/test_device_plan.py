"""The fusion weights that the kernels of a GPU found, on their way to the host."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from loose_adapters import EMBEDDING, FIRST, SECOND, make_modules
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fusionserve.adapters.fused_tokens import FusedRange
from fusionserve.adapters.fusion_rows import FusionModule, FusionRows
from fusionserve.engine.device_plan import DevicePlanner
from fusionserve.engine.fused_chunks import FusedChunks, LateWeights

WIDTH = 4


class Operations(TorchDispatchMode):
    """The names of torch's operations in its block, but for views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def make_rows(num_members: int, *attentions: str, base_member: bool = False) -> FusionRows:
    present = torch.ones(num_members, dtype=torch.bool)
    modules = {path: FusionModule(path in attentions, present) for path in (FIRST, SECOND)}
    return FusionRows(
        row_counts=(4,) * num_members, has_member_keys=False, has_base_member=base_member, modules=modules
    )


def make_group(rows: FusionRows, start: int, end: int) -> FusedChunks:
    tokens = FusedRange(start, end, 0, rows, torch.ones(rows.num_members, dtype=torch.bool))
    return FusedChunks(rows, tokens, ((f"chunk at {start}", start, end),))


def found_weights() -> Tensor:
    """[modules, tokens, WIDTH + 1], another number everywhere."""
    return torch.arange(3 * 6 * (WIDTH + 1), dtype=torch.float32).view(3, 6, WIDTH + 1) / 100


def test_each_fusion_gets_the_weights_of_its_members_at_its_attentions() -> None:
    """Fewer members than there is room for, with and without a base member, and as many."""
    planner = DevicePlanner(make_modules(), torch.zeros(0))
    rows = [
        make_rows(2, FIRST, SECOND),
        make_rows(3, SECOND, base_member=True),
        make_rows(4, FIRST, base_member=True),
        make_rows(1),
    ]
    groups = [
        make_group(own, *ends) for own, ends in zip(rows, ((3, 5), (5, 6), (6, 8), (8, 9)), strict=True)
    ]
    items, ids = SimpleNamespace(weights=found_weights()), {EMBEDDING: 0, FIRST: 1, SECOND: 2}
    planner.collect_weights([group.tokens for group in groups], items)
    found = LateWeights(groups).read()
    assert list(found) == ["chunk at 3", "chunk at 5", "chunk at 6"]
    wanted = (
        ((FIRST, SECOND), slice(0, 2), [0, 1]),
        ((SECOND,), slice(2, 3), [0, 1, 2, 4]),
        ((FIRST,), slice(3, 5), [0, 1, 2, 3, 4]),
    )
    for chunk, (paths, tokens, columns) in zip(found.values(), wanted, strict=True):
        own = items.weights[[ids[path] for path in paths]][:, tokens][..., columns]
        assert chunk.found.modules == paths and torch.equal(chunk.found.by_module, own)


def test_weights_of_a_fusion_leave_the_device_by_one_operation() -> None:
    planner = DevicePlanner(make_modules(), torch.zeros(0))
    groups = [make_group(make_rows(2, FIRST, SECOND), 0, 2), make_group(make_rows(3, FIRST, SECOND), 2, 4)]
    tokens, items = [group.tokens for group in groups], SimpleNamespace(weights=found_weights())
    planner.collect_weights(tokens, items)  # which sends the ids
    with Operations() as operations:
        planner.collect_weights(tokens, items)
        LateWeights(groups)
    assert operations.names == ["index_select"] * 2
