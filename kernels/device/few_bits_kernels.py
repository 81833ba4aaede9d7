"""Products with weights of 8 or 4 bits in Triton: inputs brought to 8 bits, sums of a group as whole numbers.

    y_to = b_o + sum_g t_tg s_og sum_(i in g) k_ti l_oi      levels k, l; scales t, s of groups of 32 inputs

Groups are added one after the other within a range of lines, and the SPLITS ranges one after the other. Who adds, one
program or several, follows from the number of tokens; the order does not, so a token gets the same bits in any company.
`quantized_linear.py` has the definition, `tiled_linear.py` the layout of the weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusionserve.kernels.device.rank_kernels import pick


@triton.jit(do_not_specialize=["num_tokens"])
def round_inputs_kernel(
    x: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    num_tokens: int,
    num_groups: int,
    LEAST: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
) -> None:
    """x [num_tokens, groups * 32] -> levels int8 [groups, num_tokens, 32], scales float32 [groups, num_tokens].

    A number that is not finite makes the scale of its group NaN. Programs (token, block of groups). It must be compiled
    without contraction, or products would not be rounded before they are rounded to whole numbers.
    """
    token = tl.program_id(0)
    groups = tl.program_id(1) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    lanes = tl.arange(0, 32)
    here = groups < num_groups
    numbers = x + token.to(tl.int64) * num_groups * 32 + groups[:, None] * 32 + lanes[None, :]
    wide = tl.load(numbers, mask=here[:, None], other=0.0).to(tl.float32)
    is_finite = tl.abs(wide) < float("inf")
    wide = tl.where(is_finite, wide, 0.0)
    largest = tl.max(tl.abs(wide), axis=1)
    has_scale = largest >= LEAST
    scaled = wide * tl.div_rn(127.0, tl.where(has_scale, largest, 1.0))[:, None]
    # Beyond 1.5 * 2^23 float32 has whole numbers only; ties go to the even one.
    whole = tl.where(has_scale[:, None], (scaled + 12582912.0) - 12582912.0, 0.0)
    scale = tl.where(tl.min(is_finite.to(tl.int32), axis=1) == 1, tl.div_rn(largest, 127.0), float("nan"))
    cells = groups * num_tokens + token
    tl.store(scales + cells, scale, mask=here)
    tl.store(levels + cells[:, None] * 32 + lanes[None, :], whole.to(tl.int8), mask=here[:, None])


@triton.jit
def _add_group(
    sums: tl.tensor,
    x: tl.tensor,
    token_scales: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    group: tl.tensor,
    num_tokens: tl.tensor,
    here: tl.tensor,
    inside: tl.tensor,
) -> tl.tensor:
    """sums [tokens, outputs] + the part of a group, whose weights' levels [outputs, 32] are given."""
    k = tl.load(x + group * num_tokens * 32, mask=here[:, None], other=0)
    t = tl.load(token_scales + group * num_tokens, mask=here, other=0.0)
    s = tl.load(scales + group * 16, mask=inside, other=0.0).to(tl.float32)
    products = tl.dot(k, tl.trans(levels), out_dtype=tl.int32).to(tl.float32)
    return tl.fma(products * t[:, None], s[None, :], sums)


@triton.jit
def _upper_halves(levels: tl.tensor, BY_WORDS: tl.constexpr) -> tl.tensor:
    """The lower and the upper level of each byte, 16 times as large: in the upper half of a byte of their own.

    Word by word is a third of the instructions, which are what int4 is bound by; the interpreter has no assembler.
    """
    if BY_WORDS:
        low = tl.inline_asm_elementwise(
            "{ .reg .b32 up; shl.b32 up, $1, 4; and.b32 $0, up, 0xF0F0F0F0; }",
            "=r,r",
            [levels],
            dtype=tl.int8,
            is_pure=True,
            pack=4,
        )
        high = tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [levels], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        low, high = (levels << 4).to(tl.int8), (levels & -16).to(tl.int8)
    return low, high


@triton.jit
def _sum_range(
    x: tl.tensor,
    token_scales: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    num_tokens: tl.tensor,
    num_groups: tl.tensor,
    here: tl.tensor,
    inside: tl.tensor,
    BITS: tl.constexpr,
    BY_WORDS: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """[tokens, outputs] over lines from begin to end; a line has 32 bytes of each output, two groups in 4 bits."""
    sums = tl.zeros((here.shape[0], inside.shape[0]), tl.float32)
    for line in tl.range(begin, end, num_stages=STAGES):
        found = tl.load(levels + line * 512, mask=inside[:, None], other=0)
        if BITS == 8:
            sums = _add_group(sums, x, token_scales, found, scales, line, num_tokens, here, inside)
        else:
            low, high = _upper_halves(found, BY_WORDS)
            group = line * 2
            sums = _add_group(sums, x, token_scales, low, scales, group, num_tokens, here, inside)
            exists = group + 1 < num_groups
            also, within = here & exists, inside & exists
            sums = _add_group(sums, x, token_scales, high, scales, group + 1, num_tokens, also, within)
    if BITS == 4:
        sums *= 0.0625  # exact, and so are sums of levels 16 times as large
    return sums


@triton.jit
def _sum_ranges(
    x: tl.tensor,
    token_scales: tl.tensor,
    levels: tl.tensor,
    scales: tl.tensor,
    tokens: tl.tensor,
    outputs: tl.tensor,
    first_range: tl.tensor,
    num_tokens: tl.tensor,
    num_groups: tl.tensor,
    d_out: tl.tensor,
    BITS: tl.constexpr,
    BY_WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_RANGES: tl.constexpr,
    STAGES: tl.constexpr,
) -> tl.tensor:
    """The product [tokens, outputs] with some outputs of a module, over NUM_RANGES of its SPLITS ranges."""
    here, inside = tokens < num_tokens, outputs < d_out
    num_lines = num_groups if BITS == 8 else (num_groups + 1) // 2
    size = (num_lines + SPLITS - 1) // SPLITS
    lanes, panels, places = tl.arange(0, 32)[None, :], (outputs // 16).to(tl.int64), outputs % 16
    x += tokens[:, None] * 32 + lanes
    levels += (panels * num_lines * 512 + places * 32)[:, None] + lanes
    scales += panels * num_groups * 16 + places
    total = tl.zeros((tokens.shape[0], outputs.shape[0]), tl.float32)
    for number in range(first_range, first_range + NUM_RANGES):
        begin, end = number * size, tl.minimum(number * size + size, num_lines)
        total += _sum_range(
            x,
            token_scales + tokens,
            levels,
            scales,
            begin,
            end,
            num_tokens,
            num_groups,
            here,
            inside,
            BITS,
            BY_WORDS,
            STAGES,
        )
    return total


@triton.jit
def _deliver(
    sums: tl.tensor, bias: tl.tensor, inside: tl.tensor, y: tl.tensor, mask: tl.tensor, ADD: tl.constexpr
) -> None:
    """Writes sums and the outputs' bias to y, or adds them, rounded once."""
    sums += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        sums += tl.load(y, mask=mask, other=0.0).to(tl.float32)
    tl.store(y, sums.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def multiply_kernel(
    x: tl.tensor,
    token_scales: tl.tensor,
    parts: tl.tensor,
    y_0: tl.tensor,
    y_1: tl.tensor,
    y_2: tl.tensor,
    levels_0: tl.tensor,
    levels_1: tl.tensor,
    levels_2: tl.tensor,
    scales_0: tl.tensor,
    scales_1: tl.tensor,
    scales_2: tl.tensor,
    bias_0: tl.tensor,
    bias_1: tl.tensor,
    bias_2: tl.tensor,
    d_out_0: int,
    d_out_1: int,
    d_out_2: int,
    num_tokens: int,
    num_groups: int,
    BITS: tl.constexpr,
    BY_WORDS: tl.constexpr,
    SPLITS: tl.constexpr,
    SHARERS: tl.constexpr,
    ADD: tl.constexpr,
    TOKENS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Rounded x and its scales -> y [num_tokens, d_out] of each module, or y += it; `tiled_linear.py` has the layouts.

    A sum is one program's, or SHARERS = SPLITS share it: a range each, into parts [places, SPLITS, num_tokens, width],
    with the width of all blocks of outputs. Programs (tile of tokens, block of outputs, place and range).
    """
    place = tl.program_id(2) // SHARERS
    d_out = pick(place, d_out_0, d_out_1, d_out_2)
    if tl.program_id(1) * OUTPUTS < d_out:
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        total = _sum_ranges(
            x,
            token_scales,
            pick(place, levels_0, levels_1, levels_2),
            pick(place, scales_0, scales_1, scales_2),
            tokens,
            outputs,
            tl.program_id(2) % SHARERS,
            num_tokens,
            num_groups,
            d_out,
            BITS,
            BY_WORDS,
            SPLITS,
            SPLITS // SHARERS,
            STAGES,
        )
        rows, columns, inside = tokens.to(tl.int64)[:, None], outputs[None, :], (outputs < d_out)[None, :]
        mask = (rows < num_tokens) & inside
        if SHARERS > 1:
            rows += tl.program_id(2).to(tl.int64) * num_tokens
            tl.store(parts + rows * (tl.num_programs(1) * OUTPUTS) + columns, total, mask=mask)
        else:
            y = pick(place, y_0, y_1, y_2) + rows * d_out + columns
            _deliver(total, pick(place, bias_0, bias_1, bias_2) + columns, inside, y, mask, ADD)


@triton.jit(do_not_specialize=["num_tokens"])
def join_ranges_kernel(
    parts: tl.tensor,
    y_0: tl.tensor,
    y_1: tl.tensor,
    y_2: tl.tensor,
    bias_0: tl.tensor,
    bias_1: tl.tensor,
    bias_2: tl.tensor,
    d_out_0: int,
    d_out_1: int,
    d_out_2: int,
    num_tokens: int,
    width: int,
    SPLITS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The parts of a shared product -> y of each module, or y += it; programs (token, block of outputs, place)."""
    token, place = tl.program_id(0).to(tl.int64), tl.program_id(2)
    outputs, d_out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), pick(place, d_out_0, d_out_1, d_out_2)
    inside = outputs < d_out
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        row = (place * SPLITS + split).to(tl.int64) * num_tokens + token
        total += tl.load(parts + row * width + outputs, mask=inside, other=0.0)
    y = pick(place, y_0, y_1, y_2) + token * d_out + outputs
    _deliver(total, pick(place, bias_0, bias_1, bias_2) + outputs, inside, y, inside, ADD)
