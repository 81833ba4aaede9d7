"""Makes the tables of a step's adapted tokens that the kernels of one GPU read (`kernels/device/rank_items.py`)."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from fusionserve.adapters.fused_tokens import FusedRange
from fusionserve.adapters.row_plan import AdaptedTokens, alike
from fusionserve.kernels.device.rank_items import BLOCK, RankTables


@dataclass(slots=True)
class _Lists:
    """The tables in the making."""

    tiles: list[tuple[int, ...]] = field(default_factory=list)
    items: list[tuple[int, ...]] = field(default_factory=list)
    coefficients: list[tuple[int, list[float]]] = field(default_factory=list)  # of some items' tokens
    groups: list[tuple[int, ...]] = field(default_factory=list)
    fused: list[tuple[int, ...]] = field(default_factory=list)
    member_of_row: list[Tensor] = field(default_factory=list)
    attends: list[Tensor] = field(default_factory=list)
    present: list[Tensor] = field(default_factory=list)

    def add_items(self, tokens: range, rows: range, group: int = -1, is_score: int = 0) -> None:
        """Items of one tile of tokens by rows that lie side by side."""
        self.items += [
            (tokens.start, len(tokens), start, min(BLOCK, rows.stop - start), group, is_score)
            for start in range(rows.start, rows.stop, BLOCK)
        ]

    def add_given(self, tokens: range, rows: range, coefficients: list[float]) -> None:
        """The same with a coefficient for each token."""
        first_item = len(self.items)
        self.add_items(tokens, rows)
        self.coefficients += [(item, coefficients) for item in range(first_item, len(self.items))]

    def add_tile(self, tokens: range, first_item: int) -> None:
        """A tile to which all items from `first_item` on are added."""
        self.tiles.append((tokens.start, len(tokens), first_item, len(self.items)))


def make_tables(
    adapted: Sequence[AdaptedTokens], fused: Sequence[FusedRange], module_ids: Mapping[str, int]
) -> RankTables:
    """Tables on the CPU of adapted tokens, given in ascending order, and of fused ones; modules by path."""
    lists = _Lists()
    for neighbours in alike(adapted):
        _add_adapted(lists, neighbours)
    for tokens in fused:
        _add_fused(lists, tokens, module_ids)
    return RankTables(
        tiles=_table(lists.tiles, 4),
        items=_table(lists.items, 6),
        given=_given(lists),
        groups=_table(lists.groups, 5),
        fused=_table(lists.fused, 4, torch.int64),
        member_of_row=_joined(lists.member_of_row, torch.int32),
        attends=_joined(lists.attends, torch.int32).view(-1, len(module_ids)),
        present=_joined(lists.present, torch.int64).view(-1, len(module_ids)),
    )


def _add_adapted(lists: _Lists, neighbours: Sequence[AdaptedTokens]) -> None:
    """Tokens on the same rank rows, in tiles."""
    whose = [tokens for tokens in neighbours for _ in range(tokens.num_tokens)]
    for tile in _tiles(neighbours[0].start, neighbours[-1].end):
        first_item = len(lists.items)
        here = [whose[token - neighbours[0].start] for token in tile]
        for index, (start, end) in enumerate(neighbours[0].places):
            coefficients = [tokens.rows[index].coefficient for tokens in here]
            lists.add_given(tile, range(start, end), coefficients)
        lists.add_tile(tile, first_item)


def _add_fused(lists: _Lists, tokens: FusedRange, module_ids: Mapping[str, int]) -> None:
    rows, group = tokens.rows, len(lists.groups)
    num_rows, num_keys = rows.num_member_rows, rows.num_members if rows.has_member_keys else 0
    first_row = sum(map(len, lists.member_of_row))
    lists.groups.append((num_rows, rows.num_members, num_keys, rows.has_base_member, first_row))
    lists.member_of_row.append(rows.member_of_row)
    lists.attends.append(_by_module(module_ids, {p: int(m.has_attention) for p, m in rows.modules.items()}))
    lists.present.append(_by_module(module_ids, {p: _bits(m.present) for p, m in rows.modules.items()}))
    allowed = [_bits(one) for one in tokens.allowed.view(-1, rows.num_members)]
    scores_start = tokens.row_start + num_rows
    for tile in _tiles(tokens.start, tokens.end):
        first_item = len(lists.items)
        lists.add_items(tile, range(tokens.row_start, scores_start), group)
        lists.add_tile(tile, first_item)
        lists.add_items(tile, range(scores_start, scores_start + num_rows + num_keys), group, 1)
        for lane, token in enumerate(tile):
            says = allowed[0] if len(allowed) == 1 else allowed[token - tokens.start]
            lists.fused.append((group, first_item, lane, says))


def _tiles(start: int, end: int) -> Iterable[range]:
    return (range(first, min(first + BLOCK, end)) for first in range(start, end, BLOCK))


def _given(lists: _Lists) -> Tensor:
    """Coefficients of tokens by rank rows, zero where there is no token or no row."""
    given = torch.zeros(len(lists.items), BLOCK, BLOCK)
    numbers = given.numpy()  # which takes lists as they are; a prompt of a fusion has thousands of items
    for item, coefficients in lists.coefficients:
        numbers[item, : len(coefficients), : lists.items[item][3]] = [[each] for each in coefficients]
    return given


def _bits(members: Tensor) -> int:
    """Which are True, as the bits of a signed number of 64."""
    bits = sum(1 << index for index, is_one in enumerate(members.tolist()) if is_one)
    return bits - (1 << 64) if bits >> 63 else bits


def _by_module(module_ids: Mapping[str, int], values: Mapping[str, int]) -> Tensor:
    return torch.tensor([values.get(path, 0) for path in module_ids])


def _table(rows: Sequence[tuple[int, ...]], width: int, dtype: torch.dtype = torch.int32) -> Tensor:
    if not rows:  # frombuffer refuses nothing
        return torch.empty(0, width, dtype=dtype)
    numbers = array("i" if dtype is torch.int32 else "q", chain.from_iterable(rows))
    return torch.frombuffer(numbers, dtype=dtype).view(-1, width)


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(list(tensors)).to(dtype) if tensors else torch.zeros(0, dtype=dtype)
