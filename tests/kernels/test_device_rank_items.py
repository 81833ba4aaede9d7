"""The Triton kernels of adapted and fused tokens, in Triton's interpreter, against the definitions in float64."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from device_kernels import DEVICE
from torch import Tensor

from fusionserve.adapters.fused_tokens import FusedRange
from fusionserve.adapters.fusion_rows import FusionModule, FusionRows
from fusionserve.adapters.rank_tables import make_tables
from fusionserve.adapters.row_plan import AdaptedTokens, RowRange
from fusionserve.kernels.device.group_parts import GroupParts
from fusionserve.kernels.device.rank_items import BLOCK, RankItems, RankTables, num_splits
from fusionserve.kernels.low_rank import reference_delta
from fusionserve.kernels.segments import PartRows

pytestmark = pytest.mark.gpu

CAPACITY, NUM_TOKENS = 400, 60


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def make_part(d_in: int, d_out: int, dtype: torch.dtype, *, bias: bool) -> PartRows:
    shrink = make((CAPACITY, d_in), dtype, d_out) * d_in**-0.5
    return PartRows(shrink, make((CAPACITY,), dtype, 2) if bias else None, make((CAPACITY, d_out), dtype, 3))


def to_device(tables: RankTables) -> RankTables:
    return RankTables(**{each.name: getattr(tables, each.name).to(DEVICE) for each in fields(RankTables)})


def rank_items(tables: RankTables, like: Tensor, *, width: int = 0) -> RankItems:
    ids = {"a": 0, "b": 1, "c": 2}
    return RankItems(to_device(tables), like, module_ids=ids, fusion_width=width)


def expected(x: Tensor, part: PartRows, y: Tensor, coefficients: Tensor) -> Tensor:
    """y plus the delta of coefficients [tokens, CAPACITY], in float64."""
    bias = x.new_zeros(CAPACITY) if part.bias is None else part.bias
    shrunk, own = x.double() @ part.shrink.double().T + bias.double(), coefficients.double()
    weighted = torch.where(own != 0, own * shrunk, 0.0)
    return y.double() + weighted @ part.expand.double()


def adapted_tokens() -> list[AdaptedTokens]:
    """Ranks 4 to 256, one token and many, a blend of two, neighbours on one adapter; 0 and the last are base tokens."""
    return [
        AdaptedTokens(1, 2, (RowRange(0, 16, 0.5),)),
        AdaptedTokens(2, 3, (RowRange(16, 20, 1.0),)),
        AdaptedTokens(3, 5, (RowRange(16, 20, -2.0),)),
        AdaptedTokens(6, 40, (RowRange(20, 53, 0.75),)),
        AdaptedTokens(40, 41, (RowRange(53, 309, 1.0),)),
        AdaptedTokens(41, 43, (RowRange(309, 317, 0.25), RowRange(0, 16, 0.0), RowRange(320, 384, 1.5))),
    ]


def coefficients_of(adapted: list[AdaptedTokens]) -> Tensor:
    coefficients = torch.zeros(NUM_TOKENS, CAPACITY, device=DEVICE)
    for tokens in adapted:
        for rows in tokens.rows:
            coefficients[tokens.start : tokens.end, rows.start : rows.end] = rows.coefficient
    return coefficients


def assert_near(y: Tensor, wide: Tensor) -> None:
    is_wide = y.dtype is torch.float32
    torch.testing.assert_close(
        y.double(), wide, rtol=1e-5 if is_wide else 2**-6, atol=1e-4 if is_wide else 0.05
    )


def test_the_oracle_is_the_definition() -> None:
    part = make_part(5, 4, torch.float32, bias=True)
    x, y, coefficients = (
        make((3, 5), torch.float32, 0),
        make((3, 4), torch.float32, 1),
        make((3, CAPACITY), torch.float32, 2),
    )
    assert part.bias is not None
    wide = [t.double() for t in (x, part.shrink, part.bias, part.expand, coefficients)]
    torch.testing.assert_close(expected(x, part, y, coefficients), y.double() + reference_delta(*wide))


@pytest.mark.parametrize(
    ("d_outs", "d_in", "dtype"),
    [((40,), 1100, torch.float32), ((130, 16, 24), 24, torch.float32), ((130, 16), 600, torch.bfloat16)],
    ids=str,
)
def test_adapted_tokens_equal_the_definition(d_outs: tuple[int, ...], d_in: int, dtype: torch.dtype) -> None:
    parts = [make_part(d_in, d_out, dtype, bias=d_out == 40) for d_out in d_outs]
    x = make((NUM_TOKENS, d_in), dtype, 0)
    outputs = [make((NUM_TOKENS, d_out), dtype, 1) for d_out in d_outs]
    adapted = adapted_tokens()
    wide = [expected(x, part, y, coefficients_of(adapted)) for part, y in zip(parts, outputs, strict=True)]
    before = [y.clone() for y in outputs]
    items = rank_items(make_tables(adapted, [], {"a": 0, "b": 1, "c": 2}), x)
    items.add_(x, GroupParts(parts, range(len(parts))), outputs)
    for y, exact, untouched in zip(outputs, wide, before, strict=True):
        assert_near(y, exact)
        base = [0, 5, *range(43, NUM_TOKENS)]
        assert torch.equal(y[base], untouched[base])


def test_token_gets_the_same_bits_in_any_company() -> None:
    part = make_part(1100, 40, torch.float32, bias=True)
    x = make((NUM_TOKENS, 1100), torch.float32, 0)
    together = torch.zeros(NUM_TOKENS, 40, device=DEVICE)
    group = GroupParts([part], [0])
    rank_items(make_tables(adapted_tokens(), [], {"a": 0, "b": 1, "c": 2}), x).add_(x, group, [together])
    for tokens in adapted_tokens():
        alone = torch.zeros(1, 40, device=DEVICE)
        own = x[tokens.start : tokens.start + 1].contiguous()
        rank_items(make_tables([AdaptedTokens(0, 1, tokens.rows)], [], {"a": 0, "b": 1, "c": 2}), x).add_(
            own, group, [alone]
        )
        assert torch.equal(alone[0], together[tokens.start])


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, interpreting
def test_zero_coefficient_means_zero_whatever_the_input() -> None:
    part = make_part(24, 20, torch.float32, bias=False)
    x, y = torch.full((2, 24), float("inf"), device=DEVICE), torch.zeros(2, 20, device=DEVICE)
    adapted = [AdaptedTokens(0, 1, (RowRange(0, 4, 0.0),)), AdaptedTokens(1, 2, (RowRange(0, 4, 1.0),))]
    rank_items(make_tables(adapted, [], {"a": 0, "b": 1, "c": 2}), x).add_(x, GroupParts([part], [0]), [y])
    assert not y[0].any()
    assert not y[1].isfinite().any()


def test_cells_of_no_token_or_row_are_neither_written_nor_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step has one or two tokens in an item for sixteen: the rest would be most of what is read."""
    part = make_part(1100, 40, torch.float32, bias=True)
    x = make((NUM_TOKENS, 1100), torch.float32, 0)
    tables = make_tables(adapted_tokens(), [], {"a": 0, "b": 1, "c": 2})
    cells = used_cells(tables)
    scratches, results = [], []
    for rest in (0.0, float("nan")):
        items = rank_items(replace(tables, given=tables.given.masked_fill(~cells, rest)), x)
        scratch = torch.full_like(items._scratch(num_splits(1100)), rest)
        monkeypatch.setattr(items, "_scratch", lambda num_sums, scratch=scratch: scratch)
        y = torch.zeros(NUM_TOKENS, 40, device=DEVICE)
        items.add_(x, GroupParts([part], [0]), [y])
        scratches.append(scratch)
        results.append(y)
    assert results[0].any() and torch.equal(*results)
    assert torch.equal(scratches[1].isnan().cpu(), (~cells).expand(scratches[1].shape))


def used_cells(tables: RankTables) -> Tensor:
    """Where an item has both a token and a rank row, [num_items, 16, 16]."""
    tokens, rows = (tables.items[:, column, None] > torch.arange(BLOCK) for column in (1, 3))
    return tokens[:, :, None] & rows[:, None, :]


def test_embedded_tokens_equal_the_definition() -> None:
    vocab, hidden = 90, 24
    part = make_part(vocab, hidden, torch.float32, bias=True)
    ids = torch.randint(0, vocab, (NUM_TOKENS,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = make((NUM_TOKENS, hidden), torch.float32, 1)
    one_hot = torch.nn.functional.one_hot(ids, vocab).float()
    wide = expected(one_hot, part, y, 3 * coefficients_of(adapted_tokens()))
    rank_items(make_tables(adapted_tokens(), [], {"a": 0, "b": 1, "c": 2}), y).add_embedded_(
        ids, GroupParts([part], [0]), y, 3.0
    )
    assert_near(y, wide)


def make_rows(*, member_keys: bool, base_member: bool, attends: tuple[bool, ...]) -> FusionRows:
    """Three members, one of which does not adapt the second module."""
    present = [torch.tensor([True, True, True]), torch.tensor([True, False, True]), torch.tensor([True] * 3)]
    modules = {n: FusionModule(a, p) for n, a, p in zip("abc", attends, present, strict=True)}
    return FusionRows(
        row_counts=(16, 20, 3), has_member_keys=member_keys, has_base_member=base_member, modules=modules
    )


def reference_weights(x: Tensor, part: PartRows, fused: FusedRange, path: str) -> Tensor:
    """Fusion weights [tokens, members (+ 1)] of a module's attention, in float64."""
    rows = fused.rows
    here = slice(fused.row_start, fused.row_start + rows.num_used_rows)
    bias = x.new_zeros(CAPACITY) if part.bias is None else part.bias
    shrunk = (x[fused.start : fused.end].double() @ part.shrink[here].double().T + bias[here].double()).cpu()
    u, scores = shrunk[:, : rows.num_member_rows], shrunk[:, rows.num_member_rows :]
    allowed = fused.allowed & rows.modules[path].present
    return rows.weights(u, scores, allowed)


@pytest.mark.parametrize(
    ("member_keys", "base_member", "dtype"),
    [(True, True, torch.float32), (False, False, torch.float32), (True, False, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("attends", [(True, False, False), (True, True, True), (True, False, True)], ids=str)
def test_fused_tokens_equal_the_definition(
    member_keys: bool, base_member: bool, dtype: torch.dtype, attends: tuple[bool, ...]
) -> None:
    d_in = 70
    parts = {
        name: make_part(d_in, d_out, dtype, bias=True) for name, d_out in zip("abc", (40, 24, 8), strict=True)
    }
    rows = make_rows(member_keys=member_keys, base_member=base_member, attends=attends)
    by_token = torch.tensor([[True] * 3, [False, True, True], [False] * 3] * 6)
    fused = [
        FusedRange(2, 20, 10, rows, by_token),
        FusedRange(20, 22, 200, rows, torch.tensor([True, True, False])),
    ]
    adapted = [AdaptedTokens(0, 2, (RowRange(310, 330, 0.5),))]
    x = make((NUM_TOKENS, d_in), dtype, 0)
    outputs = {name: make((NUM_TOKENS, len(part.expand[0])), dtype, 1) for name, part in parts.items()}
    before = {name: y.clone() for name, y in outputs.items()}
    module_ids = {"a": 0, "b": 1, "c": 2}
    items = rank_items(make_tables(adapted, fused, module_ids), x, width=4)
    items.add_(x, GroupParts(list(parts.values()), [0, 1, 2]), list(outputs.values()))
    coefficients = coefficients_of(adapted)
    for module, (name, part) in enumerate(parts.items()):
        for tokens in fused:
            if rows.modules[name].has_attention:
                weights = reference_weights(x, part, tokens, name)
                found = items.weights[module, tokens.start - 2 : tokens.end - 2].cpu().double()
                found = torch.cat([found[:, :3], found[:, 4:]], 1)[:, : 3 + base_member]
                torch.testing.assert_close(found, weights.double(), rtol=1e-4, atol=1e-5)
                spread = weights[:, rows.member_of_row].to(DEVICE).float()
                coefficients[tokens.start : tokens.end, tokens.row_start : tokens.row_start + 39] = spread
        assert_near(outputs[name], expected(x, part, before[name], coefficients))


def test_tables_may_be_larger_than_what_they_hold() -> None:
    part = make_part(24, 20, torch.float32, bias=True)
    rows = make_rows(member_keys=True, base_member=False, attends=(True, False, False))
    fused = [FusedRange(3, 6, 100, rows, torch.tensor([True] * 3))]
    tables = make_tables(adapted_tokens()[:2], fused, {"a": 0, "b": 1, "c": 2})
    x = make((NUM_TOKENS, 24), torch.float32, 0)
    results = []
    for spare in (0, 5):
        padded = RankTables(
            **{each.name: _padded(getattr(tables, each.name), spare) for each in fields(RankTables)}
        )
        if spare:
            padded.fused[len(tables.fused) :, 0] = -1
        y = torch.zeros(NUM_TOKENS, 20, device=DEVICE)
        rank_items(padded, x, width=4).add_(x, GroupParts([part], [0]), [y])
        results.append(y)
    assert results[0].any() and torch.equal(*results)


def test_tables_of_a_long_prompt_are_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(member_keys=True, base_member=False, attends=(True, False, False))
    ranges = [FusedRange(0, 600, 0, rows, torch.tensor([True] * 3))]
    adapted = [AdaptedTokens(600, 1200, (RowRange(0, 300, 0.5),))]
    made, make_tensor = [], torch.tensor

    def count(*values: object, **options: object) -> Tensor:
        made.append(make_tensor(*values, **options))
        return made[-1]

    monkeypatch.setattr(torch, "tensor", count)
    tables = make_tables(adapted, ranges, {"a": 0, "b": 1, "c": 2})
    assert len(tables.items) > 500 and len(made) < 10


def _padded(table: Tensor, spare: int) -> Tensor:
    return torch.cat([table, table.new_zeros(spare, *table.shape[1:])])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what overflows in the interpreter
def test_weights_that_an_earlier_step_left_behind_count_for_nothing() -> None:
    """The tables and scratch of a graph stay; scores that overflow leave what is not a number."""
    part = make_part(64, 64, torch.float32, bias=False)
    parts, x = GroupParts([part], [0]), make((1, 64), torch.float32, 1)
    everybody = torch.ones(2, dtype=torch.bool)
    full, narrow = (
        make_tables([], [FusedRange(0, 1, start, whole_fusion(counts), everybody)], {"a": 0, "b": 1, "c": 2})
        for start, counts in ((0, (8, 8)), (64, (8, 4)))
    )
    items = rank_items(full, x, width=2)
    for tables, inputs, is_finite in ((full, torch.full_like(x, 1e25), False), (narrow, x, True)):
        for each in fields(RankTables):
            target, values = getattr(items.tables, each.name), getattr(tables, each.name)
            copied = values.to(DEVICE, copy=True)  # a CPU's are the target itself at first
            target.zero_()
            target[: len(copied)] = copied
        y = torch.zeros(1, 64, device=DEVICE)
        items.add_(inputs, parts, [y])
        assert bool(y.isfinite().all()) is is_finite


def whole_fusion(counts: tuple[int, ...]) -> FusionRows:
    module = FusionModule(True, torch.ones(len(counts), dtype=torch.bool))
    return FusionRows(row_counts=counts, has_member_keys=False, has_base_member=False, modules={"a": module})
