"""From rank rows to fusion weights to coefficients, in Triton, token by token and in float32.

    score_ti = sum_j u_tj g_tj + n_ti     a_ti = softmax_i(score_ti)     c_tj = a_t(member of row j)

`fusion_weights.py` has the definition, `rank_items.py` the layout of the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _sum_of_splits(
    u: tl.tensor, cells: tl.tensor, mask: tl.tensor, num_items: tl.tensor, SPLITS: tl.constexpr
) -> tl.tensor:
    total = tl.load(u + cells, mask=mask, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(u + split * num_items * 256 + cells, mask=mask, other=0.0)
    return total


@triton.jit
def _scores(
    u: tl.tensor,
    first_item: tl.tensor,
    whose_row: tl.tensor,
    num_rows: tl.tensor,
    num_keys: tl.tensor,
    num_items: tl.tensor,
    SPLITS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> tl.tensor:
    """Scores [BLOCK_MEMBERS] of a token whose row in every item begins at u; the keys' part is the last items'."""
    members = tl.arange(0, BLOCK_MEMBERS)
    score_item = first_item + (num_rows + 15) // 16
    keys = num_rows + members
    key_cells = (score_item + keys // 16) * 256 + keys % 16
    scores = _sum_of_splits(u, key_cells, members < num_keys, num_items, SPLITS)
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        inside = rows < num_rows
        cells = rows // 16 * 256 + rows % 16
        products = _sum_of_splits(u, first_item * 256 + cells, inside, num_items, SPLITS)
        products *= _sum_of_splits(u, score_item * 256 + cells, inside, num_items, SPLITS)
        whose = tl.load(whose_row + rows, mask=inside, other=-1)
        # Sums of each member's own: one member's overflow stays its own.
        scores += tl.sum(tl.where(members[:, None] == whose[None, :], products[None, :], 0.0), axis=1)
    return scores


@triton.jit
def _softmax(scores: tl.tensor, may: tl.tensor, has_base: tl.tensor) -> tl.tensor:
    """Shares of the members that may, zero for the others, and of the base member, whose score is 0."""
    scores = tl.where(may, scores, float("-inf"))
    best = tl.max(scores, axis=0)
    best = tl.where(has_base != 0, tl.maximum(best, 0.0), best)
    best = tl.where(best == float("-inf"), 0.0, best)
    powers = tl.where(may, tl.exp(scores - best), 0.0)
    base = tl.where(has_base != 0, tl.exp(0.0 - best), 0.0)
    total = tl.sum(powers, axis=0) + base
    total = tl.where(total == 0.0, 1.0, total)
    return powers / total, base / total


@triton.jit
def _spread(
    shares: tl.tensor,
    coefficients: tl.tensor,
    whose_row: tl.tensor,
    num_rows: tl.tensor,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """Writes to each rank row's coefficient its member's share."""
    members = tl.arange(0, BLOCK_MEMBERS)
    for start in range(0, num_rows, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        whose = tl.load(whose_row + rows, mask=rows < num_rows, other=-1)
        own = tl.sum(tl.where(members[:, None] == whose[None, :], shares[:, None], 0.0), axis=0)
        tl.store(coefficients + rows // 16 * 256 + rows % 16, own, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_items", "num_fused"])
def weigh_kernel(
    u: tl.tensor,
    attended: tl.tensor,
    shares: tl.tensor,
    weights: tl.tensor,
    fused_tokens: tl.tensor,
    groups: tl.tensor,
    member_of_row: tl.tensor,
    attends: tl.tensor,
    present: tl.tensor,
    modules: tl.tensor,
    num_items: int,
    num_fused: int,
    num_modules: int,
    PLACES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_MEMBERS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
) -> None:
    """A fusion's attention at the modules of a group: u of members and scores -> `attended`; programs (fused token,).

    Modules without an attention take the shares of the one before them, kept in `shares` [num_fused, BLOCK_MEMBERS]
    from group to group. `weights` [num_modules, num_fused, BLOCK_MEMBERS + 1] is for reports, the base member last.
    """
    fused = tl.program_id(0)
    group = tl.load(fused_tokens + fused * 4).to(tl.int32)
    if group >= 0:
        first_item = tl.load(fused_tokens + fused * 4 + 1).to(tl.int32)
        lane = tl.load(fused_tokens + fused * 4 + 2).to(tl.int32)
        allowed = tl.load(fused_tokens + fused * 4 + 3)
        num_rows, num_members = tl.load(groups + group * 5), tl.load(groups + group * 5 + 1)
        num_keys, has_base = tl.load(groups + group * 5 + 2), tl.load(groups + group * 5 + 3)
        whose_row = member_of_row + tl.load(groups + group * 5 + 4)
        members = tl.arange(0, BLOCK_MEMBERS)
        kept = shares + fused * BLOCK_MEMBERS + members
        current = tl.load(kept)
        for place in tl.static_range(PLACES):
            module = tl.load(modules + place)
            if tl.load(attends + group * num_modules + module) != 0:
                own = u + place * SPLITS * num_items * 256 + lane * 16
                scores = _scores(
                    own,
                    first_item,
                    whose_row,
                    num_rows,
                    num_keys,
                    num_items,
                    SPLITS,
                    BLOCK_MEMBERS,
                    BLOCK_ROWS,
                )
                says = allowed & tl.load(present + group * num_modules + module)
                may = (members < num_members) & (((says >> members.to(tl.int64)) & 1) != 0)
                current, base = _softmax(scores, may, has_base)
                report = weights + (module.to(tl.int64) * num_fused + fused) * (BLOCK_MEMBERS + 1)
                tl.store(report + members, current)
                tl.store(report + BLOCK_MEMBERS, base)
            coefficients = attended + (place * num_items + first_item) * 256 + lane * 16
            _spread(current, coefficients, whose_row, num_rows, BLOCK_MEMBERS, BLOCK_ROWS)
        tl.store(kept, current)
