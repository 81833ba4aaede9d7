"""The one equation in Triton: items of up to 16 tokens by 16 rank rows, for the modules of a group at once.

    u_itj = A_(row j of item i) x_t + a_j                 shrink, in SPLITS partial sums over the input
    y_t   = y_t + sum_ij c_itj u_itj B_(row j of item i)  expand, over the items of the token's tile

Nothing is padded to the widest adapter: a rank of r takes ceil(r / 16) items, base tokens take none. The order of a sum
depends on its item alone, so a token gets the same in any company. `rank_items.py` has the layout of the tables.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(place: tl.tensor, first: tl.tensor, second: tl.tensor, third: tl.tensor) -> tl.tensor:
    """What belongs to a module of the group."""
    chosen = first
    if place == 1:
        chosen = second
    if place == 2:
        chosen = third
    return chosen


@triton.jit(do_not_specialize=["num_items"])
def shrink_kernel(
    x: tl.tensor,
    u: tl.tensor,
    items: tl.tensor,
    attends: tl.tensor,
    rows_0: tl.tensor,
    rows_1: tl.tensor,
    rows_2: tl.tensor,
    bias_0: tl.tensor,
    bias_1: tl.tensor,
    bias_2: tl.tensor,
    modules: tl.tensor,
    d_in: int,
    num_items: int,
    num_modules: int,
    SPLITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE_DOT: tl.constexpr,
) -> None:
    """x [num_tokens, d_in] -> u [places, SPLITS, num_items, 16, 16]; programs (item, split, place).

    The rows of a fusion's scores are wanted only where `attends` [groups, num_modules] says so.
    """
    item, split, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token_start, num_tokens = tl.load(items + item * 6), tl.load(items + item * 6 + 1)
    row_start, num_rows = tl.load(items + item * 6 + 2), tl.load(items + item * 6 + 3)
    is_wanted = num_tokens > 0
    if tl.load(items + item * 6 + 5) != 0:
        group = tl.load(items + item * 6 + 4)
        module = tl.load(modules + place)
        is_wanted = tl.load(attends + group * num_modules + module) != 0
    if is_wanted:
        lanes = tl.arange(0, 16)
        here, rows_here = lanes < num_tokens, lanes < num_rows
        x_rows = x + (token_start + lanes).to(tl.int64)[:, None] * d_in
        a_rows = pick(place, rows_0, rows_1, rows_2) + (row_start + lanes).to(tl.int64)[:, None] * d_in
        sums = tl.zeros((16, 16), tl.float32)
        for start in range(split * BLOCK_K, d_in, SPLITS * BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            inside = (columns < d_in)[None, :]
            tokens = tl.load(x_rows + columns[None, :], mask=here[:, None] & inside, other=0.0)
            rows = tl.load(a_rows + columns[None, :], mask=rows_here[:, None] & inside, other=0.0)
            if WIDE_DOT:
                tokens, rows = tokens.to(tl.float32), rows.to(tl.float32)
            sums = tl.dot(tokens, tl.trans(rows), sums, input_precision="ieee")
        if split == 0:
            bias = pick(place, bias_0, bias_1, bias_2) + row_start + lanes
            sums += tl.load(bias, mask=rows_here, other=0.0).to(tl.float32)[None, :]
        block = u + ((place * SPLITS + split) * num_items + item) * 256
        mask = here[:, None] & rows_here[None, :]  # nobody reads the rest
        tl.store(block + lanes[:, None] * 16 + lanes[None, :], sums, mask=mask)


@triton.jit
def shrink_ids_kernel(
    ids: tl.tensor, u: tl.tensor, items: tl.tensor, rows: tl.tensor, bias: tl.tensor, vocab: int
) -> None:
    """The shrink of one-hot inputs: token ids [num_tokens] -> u [num_items, 16, 16]; programs (item,)."""
    item = tl.program_id(0)
    token_start, num_tokens = tl.load(items + item * 6), tl.load(items + item * 6 + 1)
    row_start, num_rows = tl.load(items + item * 6 + 2), tl.load(items + item * 6 + 3)
    lanes = tl.arange(0, 16)
    here, rows_here = lanes < num_tokens, lanes < num_rows
    columns = tl.load(ids + token_start + lanes, mask=here, other=0)
    addresses = rows + (row_start + lanes).to(tl.int64)[None, :] * vocab + columns[:, None]
    mask = here[:, None] & rows_here[None, :]
    found = tl.load(addresses, mask=mask, other=0.0).to(tl.float32)
    found += tl.load(bias + row_start + lanes, mask=rows_here, other=0.0).to(tl.float32)[None, :]
    tl.store(u + item * 256 + lanes[:, None] * 16 + lanes[None, :], found, mask=mask)


@triton.jit
def _weighted(
    u: tl.tensor,
    items: tl.tensor,
    given: tl.tensor,
    attended: tl.tensor,
    item: tl.tensor,
    place: tl.tensor,
    here: tl.tensor,
    rows_here: tl.tensor,
    scale: tl.tensor,
    num_items: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """c u of an item, [16, 16]: exactly zero where the coefficient is, whatever u is, and where no token or row is."""
    lanes = tl.arange(0, 16)
    cells = item * 256 + lanes[:, None] * 16 + lanes[None, :]
    # Of the 16 tokens a decoding step has one or two, and behind them and the last row lies what an earlier step left.
    inside = here[:, None] & rows_here[None, :]
    shrunk = tl.zeros((16, 16), tl.float32)
    for split in range(SPLITS):
        shrunk += tl.load(u + (place * SPLITS + split) * num_items * 256 + cells, mask=inside, other=0.0)
    if tl.load(items + item * 6 + 4) >= 0:
        coefficients = tl.load(attended + place * num_items * 256 + cells, mask=inside, other=0.0)
    else:
        coefficients = tl.load(given + cells, mask=inside, other=0.0)
    return tl.where(coefficients != 0, shrunk * coefficients * scale, 0.0)


@triton.jit(do_not_specialize=["num_items"])
def expand_kernel(
    u: tl.tensor,
    items: tl.tensor,
    tiles: tl.tensor,
    given: tl.tensor,
    attended: tl.tensor,
    y_0: tl.tensor,
    y_1: tl.tensor,
    y_2: tl.tensor,
    rows_0: tl.tensor,
    rows_1: tl.tensor,
    rows_2: tl.tensor,
    d_out_0: int,
    d_out_1: int,
    d_out_2: int,
    num_items: int,
    scale: float,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE_DOT: tl.constexpr,
) -> None:
    """y [num_tokens, d_out] of each module gets the items' parts; programs (tile, block of outputs, place).

    Coefficients are `given` [num_items, 16, 16], or those `attended` [places, num_items, 16, 16] of a fusion.
    """
    tile, place = tl.program_id(0), tl.program_id(2)
    token_start, num_tokens = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    d_out = pick(place, d_out_0, d_out_1, d_out_2)
    if (num_tokens > 0) & (tl.program_id(1) * BLOCK_N < d_out):
        lanes = tl.arange(0, 16)
        here = lanes < num_tokens
        outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (outputs < d_out)[None, :]
        b_rows = pick(place, rows_0, rows_1, rows_2) + outputs[None, :]
        sums = tl.zeros((16, BLOCK_N), tl.float32)
        for item in range(tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)):
            row_start, num_rows = tl.load(items + item * 6 + 2), tl.load(items + item * 6 + 3)
            addresses = b_rows + (row_start + lanes).to(tl.int64)[:, None] * d_out
            rows_here = lanes < num_rows
            rows = tl.load(addresses, mask=rows_here[:, None] & inside, other=0.0)
            if WIDE_DOT:
                rows = rows.to(tl.float32)
            weighted = _weighted(
                u, items, given, attended, item, place, here, rows_here, scale, num_items, SPLITS
            )
            sums = tl.dot(weighted.to(rows.dtype), rows, sums, input_precision="ieee")
        y = pick(place, y_0, y_1, y_2)
        y += (token_start + lanes).to(tl.int64)[:, None] * d_out + outputs[None, :]
        mask = here[:, None] & inside
        before = tl.load(y, mask=mask, other=0.0)
        tl.store(y, (before.to(tl.float32) + sums).to(before.dtype), mask=mask)
