"""A batch that stays as it is keeps its plan and its fused tokens; one that does not gets new ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fusionserve.adapters.fusion_rows import FusionModule, FusionRows
from fusionserve.engine.fused_chunks import ChunkRange, FusedPlanner
from fusionserve.engine.row_planner import RowPlanner
from fusionserve.engine.scheduled_batch import ScheduledChunk
from fusionserve.kernels.segments import can_add

LIKE = torch.empty(0)
ROWS = FusionRows(
    row_counts=(2, 3),
    has_member_keys=False,
    has_base_member=False,
    modules={"m": FusionModule(has_attention=True, present=torch.tensor([True, True]))},
)


def make_range(start: int, end: int, adaptation: Any, row_starts: tuple[int, ...]) -> ChunkRange:
    generation = SimpleNamespace(adaptation=adaptation, adapters=adaptation.adapters)
    request: Any = SimpleNamespace(generation=generation)
    return ScheduledChunk(request, 5, end - start, row_starts), start, end


def lora(
    start: int, end: int, *, row_start: int = 0, coefficient: float = 1.0, is_whole: bool = False
) -> ChunkRange:
    adapter = SimpleNamespace(num_rows=4, weights=SimpleNamespace(is_low_rank_only=not is_whole))
    adaptation = SimpleNamespace(fusion=None, adapters=(adapter,), coefficients=(coefficient,))
    return make_range(start, end, adaptation, (row_start,))


def fused(
    start: int, end: int, *, rows: FusionRows = ROWS, excluded: frozenset[int] = frozenset()
) -> ChunkRange:
    allowed = torch.tensor([index not in excluded for index in range(2)])
    fusion = SimpleNamespace(content=SimpleNamespace(folded=SimpleNamespace(rows=rows)))
    adaptation = SimpleNamespace(fusion=fusion, adapters=(), excluded=excluded, allowed_members=allowed)
    return make_range(start, end, adaptation, (7,))


def test_plan_of_the_same_batch_is_made_once() -> None:
    planner = RowPlanner(LIKE)
    plan = planner.plan([lora(0, 1), lora(1, 2, row_start=4)], 3, [])
    assert planner.plan([lora(0, 1), lora(1, 2, row_start=4)], 3, []) is plan


def test_plan_follows_every_change_of_the_batch() -> None:
    planner = RowPlanner(LIKE)
    batches = [
        ([lora(0, 1)], 2),
        ([lora(0, 1)], 3),
        ([lora(0, 1, coefficient=0.5)], 3),
        ([lora(0, 1, row_start=4, coefficient=0.5)], 3),
        ([lora(1, 2, row_start=4, coefficient=0.5)], 3),
        ([], 3),
    ]
    plans = [planner.plan(ranges, num_tokens, []) for ranges, num_tokens in batches]
    fresh = [RowPlanner(LIKE).plan(ranges, num_tokens, []) for ranges, num_tokens in batches]
    assert len({id(plan) for plan in plans}) == len(batches)
    assert [plan.num_tokens for plan in plans] == [plan.num_tokens for plan in fresh]
    for plan, expected in zip(plans, fresh, strict=True):
        assert [s.row_start for s in plan.spans] == [s.row_start for s in expected.spans]
        assert str(plan.segments and plan.segments.adapted) == str(
            expected.segments and expected.segments.adapted
        )


def test_adapters_of_whole_modules_are_not_kept() -> None:
    planner = RowPlanner(LIKE)
    ranges = [lora(0, 1, is_whole=True)]
    assert planner.plan(ranges, 1, []) is not planner.plan(ranges, 1, [])


@pytest.mark.skipif(
    not can_add(LIKE), reason="fused tokens hold what their step computes without native kernels"
)
def test_fused_tokens_are_kept_while_nothing_changes() -> None:
    planner = FusedPlanner(LIKE)
    first = planner.plan([fused(0, 1), fused(1, 2)])[0]
    again = planner.plan([fused(0, 1), fused(1, 2)])[0]
    assert again.tokens is first.tokens
    assert again.ranges is not first.ranges  # the chunks are those of the step
    others = [
        [fused(0, 1)],
        [fused(0, 1), fused(1, 2, excluded=frozenset({0}))],
        [fused(0, 1, excluded=frozenset({0})), fused(1, 2)],
        [fused(0, 1, rows=other_rows()), fused(1, 2, rows=other_rows())],
    ]
    for ranges in others:
        assert planner.plan(ranges)[0].tokens is not first.tokens
    assert planner.plan([fused(0, 1), fused(1, 2)])[0].tokens is not first.tokens  # of the last step only


def test_tokens_that_disagree_on_members_have_a_mask_each() -> None:
    group = FusedPlanner(LIKE).plan([fused(0, 1), fused(1, 3, excluded=frozenset({1}))])[0]
    allowed: Any = vars(group.tokens)["_allowed"]
    assert allowed.tolist() == [[True, True], [True, False], [True, False]]


def other_rows() -> FusionRows:
    return FusionRows(row_counts=(2, 3), has_member_keys=False, has_base_member=False, modules=ROWS.modules)
