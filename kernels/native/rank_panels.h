// How rank rows lie where the processor multiplies pairs of bfloat16, in tile registers or in vectors: as they are
// multiplied, in one stretch from the first to the last.
//
// A resident's rows have its own part of the pool's memory, as many rows of it, and it is laid out by the resident alone:
//     shrink: blocks of 16 rows, each [d_in / 2][rows][2]: for each pair of inputs, the rows' pairs
//     expand: blocks of 32 rows, each [d_out / 16][rows / 2][16][2]: for each panel of outputs, pairs of rows
// The last block has the rows that are left. A register is filled from whole lines, so it also takes what lies behind a
// narrower block: numbers that meet zeros, or make sums that nobody reads. Behind the last row are SPARE_NUMBERS such ones.
#pragma once

#include "panels.h"

#include <algorithm>

constexpr Index SHRINK_ROWS = 16;
constexpr Index EXPAND_ROWS = 32;
constexpr Index SPARE_NUMBERS = 512;

// Rows of the block that begins with `row`, of a resident with `extent` rows.
static inline Index rows_in_block(Index extent, Index row, Index most) { return std::min(most, extent - row); }

// Up to 16 rank rows of a resident, as their panel has them, and their bias or null.
struct RowBlock {
    const BFloat16* rows;
    Index width;
    const BFloat16* bias;
};

// True if rank rows of modules with so many inputs are multiplied that way.
static inline bool has_panels([[maybe_unused]] Index d_in) {
#ifdef __AVX512BF16__
    return d_in % 2 == 0;
#else
    return false;
#endif
}
