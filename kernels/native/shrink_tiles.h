// What rank rows make of tokens, u = A x + a, in the processor's tile registers.
//
// Tokens go in as they lie, [16 tokens][32 inputs], and rank rows as their panels do. Every output is summed over 32 inputs
// at a time, in order, whoever shares the registers.
#pragma once

#include "lanes.h"
#include "rank_panels.h"
#include "tile_registers.h"

#ifdef HAS_TILE_REGISTERS

class ShrinkTiles {
public:
    ShrinkTiles(const Tokens& tokens, const BFloat16* rows, const BFloat16* bias, Index extent)
        : tokens_(tokens), rows_(rows), bias_(bias), extent_(extent) {}

    // take(token, row, count, u): what a token makes of a block of rows, both counted from the first of those given.
    template <typename Take>
    void shrink(Index token, Index num_tokens, Index row, Index num_rows, const Take& take) const {
        const Index num_whole = num_tokens / TILE_ROWS, num_left = num_tokens % TILE_ROWS;
        if (num_whole > 0) by_rows({token, 0, num_whole, TILE_ROWS, row, num_rows}, take);
        if (num_left > 0) by_rows({token, num_whole * TILE_ROWS, 1, num_left, row, num_rows}, take);
        release_tiles();
    }

private:
    // Blocks of `count` tokens, of which `before` come before, by some rows.
    struct Some {
        Index token, before, num_blocks, count, row, num_rows;
    };

    template <typename Take>
    void by_rows(const Some& some, const Take& take) const {
        shape(some.count);
        Index row = 0;
        if (some.num_blocks == 1)
            for (; row + 3 * SHRINK_ROWS < some.num_rows; row += 4 * SHRINK_ROWS) by_tokens<4>(some, row, take);
        for (; row + SHRINK_ROWS < some.num_rows; row += 2 * SHRINK_ROWS) by_tokens<2>(some, row, take);
        if (row < some.num_rows) by_tokens<1>(some, row, take);
    }

    // Registers: sums 0 to 3, tokens 4 and 5, rank rows 6 and 7.
    static void shape(Index num_tokens) {
        static const auto shapes = shapes_by_rows(TILE_ROWS, [](TileShapes& some, int num_rows) {
            for (int tile : {0, 1, 2, 3, 4, 5}) some.set(tile, num_rows);
            for (int tile : {6, 7}) some.set(tile, TILE_ROWS);
        });
        shape_tiles(shapes[num_tokens]);
    }

    template <int ROWS, typename Take>
    void by_tokens(const Some& some, Index row, const Take& take) const {
        constexpr Index MOST = 4 / ROWS;
        Index block = 0;
        for (; block + MOST <= some.num_blocks; block += MOST) multiply<ROWS, MOST>(some, row, block, take);
        if constexpr (MOST == 4)
            for (; block + 2 <= some.num_blocks; block += 2) multiply<ROWS, 2>(some, row, block, take);
        for (; block < some.num_blocks; ++block) multiply<ROWS, 1>(some, row, block, take);
    }

    template <int ROWS, int TOKENS, typename Take>
    void multiply(const Some& some, Index row, Index block, const Take& take) const {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        const Index first = some.before + block * TILE_ROWS;
        const BFloat16* x = static_cast<const BFloat16*>(tokens_.x) + (some.token + first) * tokens_.x_stride;
        const Index last_width = rows_in_block(extent_, some.row + row + (ROWS - 1) * SHRINK_ROWS, SHRINK_ROWS);
        for (Index input = 0; input < tokens_.d_in; input += TILE_DEPTH)
            add_products<ROWS, TOKENS>(x + input, rows_ + (some.row + row) * tokens_.d_in, input, last_width);
        collect<ROWS, TOKENS>(some, row, first, take);
    }

    // Each block of tokens meets each block of rows; what stays in its register is loaded once.
    template <int ROWS, int TOKENS, int SUMS = 0>
    void add_products(const BFloat16* x, const BFloat16* rows, Index input, Index last_width) const {
        if constexpr (SUMS < ROWS * TOKENS) {
            constexpr int TOKEN = SUMS / ROWS, ROW = SUMS % ROWS;
            if constexpr (ROW == 0)
                load_tile<4 + TOKEN % 2>(x + TOKEN * TILE_ROWS * tokens_.x_stride, tokens_.x_stride * sizeof(BFloat16));
            if constexpr (TOKEN == 0) {
                const Index width = ROW + 1 < ROWS ? SHRINK_ROWS : last_width;
                load_tile<6 + ROW % 2>(rows + ROW * SHRINK_ROWS * tokens_.d_in + input * width, width * sizeof(uint32_t));
            }
            add_pair_products<SUMS, 4 + TOKEN % 2, 6 + ROW % 2>();
            add_products<ROWS, TOKENS, SUMS + 1>(x, rows, input, last_width);
        }
    }

    template <int ROWS, int TOKENS, int SUMS = 0, typename Take>
    void collect(const Some& some, Index row, Index token, const Take& take) const {
        if constexpr (SUMS < ROWS * TOKENS) {
            const Index first = row + SUMS % ROWS * SHRINK_ROWS, count = std::min(SHRINK_ROWS, some.num_rows - first);
            alignas(64) float u[TILE_ROWS][SHRINK_ROWS];
            store_tile<SUMS>(u, sizeof u[0]);
            Lanes offsets = {};
            if (bias_) offsets = (Lanes)widen(_mm256_maskz_loadu_epi16((1u << count) - 1, bias_ + some.row + first));
            for (Index t = 0; t < some.count; ++t) {
                if (bias_) store_lanes(load_lanes(u[t]) + offsets, u[t]);
                take(token + SUMS / ROWS * TILE_ROWS + t, first, count, u[t]);
            }
            collect<ROWS, TOKENS, SUMS + 1>(some, row, token, take);
        }
    }

    const Tokens& tokens_;
    const BFloat16* rows_;  // the resident's panels
    const BFloat16* bias_;  // of its first row, or null
    Index extent_;
};

#endif
