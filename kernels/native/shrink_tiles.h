// What rank rows make of tokens, u = A x + a, in the processor's tile registers.
//
// Tokens go in as they lie, [16 tokens][32 inputs], and rank rows as their panels do. Every output is summed over 32 inputs
// at a time, in order, whoever shares the registers.
#pragma once

#include "lanes.h"
#include "rank_panels.h"
#include "tile_registers.h"

#ifdef HAS_TILE_REGISTERS

// `block_of(i)` is the i-th of `num_row_blocks` blocks of rank rows.
template <typename BlockOf>
class ShrinkTiles {
public:
    ShrinkTiles(const Tokens& tokens, Index num_row_blocks, const BlockOf& block_of)
        : tokens_(tokens), num_row_blocks_(num_row_blocks), block_of_(block_of) {}

    // take(token, row_block, u): what a token, counted from the first of those given, makes of a block of rows.
    template <typename Take>
    void shrink(Index token, Index num_tokens, const Take& take) const {
        const Index num_whole = num_tokens / TILE_ROWS, num_left = num_tokens % TILE_ROWS;
        if (num_whole > 0) by_rows({token, 0, num_whole, TILE_ROWS}, take);
        if (num_left > 0) by_rows({token, num_whole * TILE_ROWS, 1, num_left}, take);
        release_tiles();
    }

private:
    // Blocks of `count` tokens, of which `before` come before.
    struct Some {
        Index token, before, num_blocks, count;
    };

    template <typename Take>
    void by_rows(const Some& some, const Take& take) const {
        shape(some.count);
        Index row = 0;
        if (some.num_blocks == 1) {
            for (; row + 4 <= num_row_blocks_; row += 4) by_tokens<4>(some, row, take);
            if (row + 3 == num_row_blocks_) return by_tokens<3>(some, row, take);
        }
        for (; row + 2 <= num_row_blocks_; row += 2) by_tokens<2>(some, row, take);
        if (row < num_row_blocks_) by_tokens<1>(some, row, take);
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
    void multiply(const Some& some, Index row, Index token_block, const Take& take) const {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        const Index first = some.before + token_block * TILE_ROWS;
        const BFloat16* x = static_cast<const BFloat16*>(tokens_.x) + (some.token + first) * tokens_.x_stride;
        RowBlock blocks[ROWS];
        for (Index i = 0; i < ROWS; ++i) blocks[i] = block_of_(row + i);
        for (Index input = 0; input < tokens_.d_in; input += TILE_DEPTH) add_products<ROWS, TOKENS>(x + input, blocks, input);
        collect<ROWS, TOKENS>(some, blocks, row, first, take);
    }

    // Each block of tokens meets each block of rows; what stays in its register is loaded once.
    template <int ROWS, int TOKENS, int SUMS = 0>
    void add_products(const BFloat16* x, const RowBlock* blocks, Index input) const {
        if constexpr (SUMS < ROWS * TOKENS) {
            constexpr int TOKEN = SUMS / ROWS, ROW = SUMS % ROWS;
            if constexpr (ROW == 0)
                load_tile<4 + TOKEN % 2>(x + TOKEN * TILE_ROWS * tokens_.x_stride, tokens_.x_stride * sizeof(BFloat16));
            if constexpr (TOKEN == 0)
                load_tile<6 + ROW % 2>(blocks[ROW].rows + input * blocks[ROW].width, blocks[ROW].width * sizeof(uint32_t));
            add_pair_products<SUMS, 4 + TOKEN % 2, 6 + ROW % 2>();
            add_products<ROWS, TOKENS, SUMS + 1>(x, blocks, input);
        }
    }

    template <int ROWS, int TOKENS, int SUMS = 0, typename Take>
    void collect(const Some& some, const RowBlock* blocks, Index row, Index token, const Take& take) const {
        if constexpr (SUMS < ROWS * TOKENS) {
            const RowBlock& block = blocks[SUMS % ROWS];
            alignas(64) float u[TILE_ROWS][SHRINK_ROWS];
            store_tile<SUMS>(u, sizeof u[0]);
            Lanes offsets = {};
            if (block.bias) offsets = (Lanes)widen(_mm256_maskz_loadu_epi16((1u << block.width) - 1, block.bias));
            for (Index t = 0; t < some.count; ++t) {
                if (block.bias) store_lanes(load_lanes(u[t]) + offsets, u[t]);
                take(token + SUMS / ROWS * TILE_ROWS + t, row + SUMS % ROWS, u[t]);
            }
            collect<ROWS, TOKENS, SUMS + 1>(some, blocks, row, token, take);
        }
    }

    const Tokens& tokens_;
    Index num_row_blocks_;
    const BlockOf& block_of_;
};

#endif
