"""Attention over a paged cache in Triton, for single tokens and for chunks of prompts alike.

    o_t = softmax_j(scale * q_t . k_j) v_j     over j <= t of the token's own request, j > t - window with a window

The query heads that share a key-value head are rows of one product, so keys and values are read once for all of them.
The softmax runs along the context in blocks, over which SPLITS programs take turns; `combine_kernel` joins their parts.
`paged_attention.py` has the definition and the layout of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _load_slots(
    cache: tl.tensor,
    slots: tl.tensor,
    inside: tl.tensor,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
) -> tl.tensor:
    """Keys or values of slots: [slots, LANES], zeros beyond DIM and where not inside."""
    dims = tl.arange(0, LANES)
    mask = inside[:, None] & (dims < DIM)[None, :]
    found = tl.load(cache + slots[:, None] * DIM + dims[None, :], mask=mask, other=0.0)
    if WIDE:
        found = found.to(tl.float32)
    return found


@triton.jit
def _store_slots(
    rows: tl.tensor,
    slots: tl.tensor,
    inside: tl.tensor,
    numbers: tl.tensor,
    DIM: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Numbers [slots, LANES] to their rows of DIM, where inside."""
    dims = tl.arange(0, LANES)
    mask = inside[:, None] & (dims < DIM)[None, :]
    tl.store(rows + slots[:, None] * DIM + dims[None, :], numbers, mask=mask)


@triton.jit
def _capped(scores: tl.tensor, softcap: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tl.tensor:
    """cap * tanh(s / cap), if there is a cap."""
    if HAS_SOFTCAP:
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
    return scores


@triton.jit
def _begin(sinks: tl.tensor, here: tl.tensor, ROWS: tl.constexpr, HAS_SINKS: tl.constexpr) -> tl.tensor:
    """The softmax of nothing, or of a sink, which has no value."""
    best, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:
        best = tl.load(sinks, mask=here, other=float("-inf"))
        total = tl.where(here, 1.0, total)
    return best, total


@triton.jit
def _join(
    scores: tl.tensor, value: tl.tensor, best: tl.tensor, total: tl.tensor, output: tl.tensor
) -> tl.tensor:
    """The softmax so far, with one block of scores and values more."""
    highest = tl.maximum(best, tl.max(scores, axis=1))
    ground = tl.where(highest == float("-inf"), 0.0, highest)
    powers, shrinkage = tl.exp(scores - ground[:, None]), tl.exp(best - ground)
    output = tl.dot(powers.to(value.dtype), value, output * shrinkage[:, None], input_precision="ieee")
    return highest, total * shrinkage + tl.sum(powers, axis=1), output


@triton.jit(do_not_specialize=["table_width"])
def attend_kernel(
    query: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    parts: tl.tensor,
    statistics: tl.tensor,
    tiles: tl.tensor,
    tables: tl.tensor,
    sinks: tl.tensor,
    table_width: int,
    num_kv_heads: int,
    window: int,
    scale: float,
    softcap: float,
    HEADS_PER_KV: tl.constexpr,
    TOKENS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIM_LANES: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    WIDE_DOT: tl.constexpr,
) -> None:
    """query [num_tokens, heads, DIM] -> parts [SPLITS, num_tiles * TOKENS, heads, VALUE_DIM] and their statistics.

    `statistics` [SPLITS, num_tiles * TOKENS, heads, 2] are the largest score and the sum of the powers, with which a
    part is to be divided. tiles [num_tiles, 4]: first token, tokens (at most TOKENS), position of the first, row of
    `tables` [requests, table_width] with the request's blocks. sinks [heads], if it HAS_SINKS. `window` is 0 for none.
    Programs (tile, kv head, split).
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tiles += tile * 4
    first, num_own, position = tl.load(tiles), tl.load(tiles + 1), tl.load(tiles + 2)
    if num_own > 0:
        tables += tl.load(tiles + 3).to(tl.int64) * table_width
        rows = tl.arange(0, TOKENS * GROUP)
        token, head = rows // GROUP, rows % GROUP
        here = (token < num_own) & (head < HEADS_PER_KV)
        row = ((first + token).to(tl.int64) * num_kv_heads + kv_head) * HEADS_PER_KV + head
        q = _load_slots(query, row, here, DIM, DIM_LANES, WIDE_DOT)
        own_sinks = sinks + kv_head * HEADS_PER_KV + head
        best, total = _begin(own_sinks, here & (split == 0), TOKENS * GROUP, HAS_SINKS)
        output = tl.zeros((TOKENS * GROUP, VALUE_LANES), tl.float32)
        seen = tl.where(window > 0, tl.maximum(position - window + 1, 0) // BLOCK_N * BLOCK_N, 0)
        for start in range(seen + split * BLOCK_N, position + num_own, SPLITS * BLOCK_N):
            positions = start + tl.arange(0, BLOCK_N)
            inside = positions < position + num_own
            blocks = tl.load(tables + positions // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            slots = (blocks * BLOCK_SIZE + positions % BLOCK_SIZE) * num_kv_heads + kv_head
            key = _load_slots(keys, slots, inside, DIM, DIM_LANES, WIDE_DOT)
            value = _load_slots(values, slots, inside, VALUE_DIM, VALUE_LANES, WIDE_DOT)
            scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
            distance = (position + token)[:, None] - positions[None, :]
            may = (distance >= 0) & ((window == 0) | (distance < window))
            scores = tl.where(may, _capped(scores, softcap, HAS_SOFTCAP), float("-inf"))
            best, total, output = _join(scores, value, best, total, output)
        place = (split.to(tl.int64) * tl.num_programs(0) + tile) * TOKENS + token
        part = (place * num_kv_heads + kv_head) * HEADS_PER_KV + head
        _store_slots(parts, part, here, output, VALUE_DIM, VALUE_LANES)
        tl.store(statistics + part * 2, best, mask=here)
        tl.store(statistics + part * 2 + 1, total, mask=here)


@triton.jit
def combine_kernel(
    parts: tl.tensor,
    statistics: tl.tensor,
    output: tl.tensor,
    tiles: tl.tensor,
    num_heads: int,
    VALUE_DIM: tl.constexpr,
    VALUE_LANES: tl.constexpr,
    HEAD_LANES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """output [num_tokens, num_heads, VALUE_DIM] from the parts of its tiles; programs (tile, token of it)."""
    tile, lane = tl.program_id(0), tl.program_id(1)
    if lane < tl.load(tiles + tile * 4 + 1):
        token = (tl.load(tiles + tile * 4) + lane).to(tl.int64)
        heads, dims = tl.arange(0, HEAD_LANES), tl.arange(0, VALUE_LANES)
        here, num_rows = heads < num_heads, tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * num_heads
        first = (tile.to(tl.int64) * tl.num_programs(1) + lane) * num_heads + heads
        best = tl.load(statistics + first * 2, mask=here, other=0.0)
        for split in range(1, SPLITS):
            best = tl.maximum(
                best, tl.load(statistics + (split * num_rows + first) * 2, mask=here, other=0.0)
            )
        total = tl.zeros((HEAD_LANES,), tl.float32)
        joined = tl.zeros((HEAD_LANES, VALUE_LANES), tl.float32)
        mask = here[:, None] & (dims < VALUE_DIM)[None, :]
        for split in range(SPLITS):
            own = split * num_rows + first
            share = tl.exp(tl.load(statistics + own * 2, mask=here, other=float("-inf")) - best)
            total += share * tl.load(statistics + own * 2 + 1, mask=here, other=0.0)
            cells = own[:, None] * VALUE_DIM + dims[None, :]
            joined += share[:, None] * tl.load(parts + cells, mask=mask, other=0.0)
        joined = joined / tl.where(here, total, 1.0)[:, None]
        cells = (token * num_heads + heads)[:, None] * VALUE_DIM + dims[None, :]
        tl.store(output + cells, joined.to(output.dtype.element_ty), mask=mask)
