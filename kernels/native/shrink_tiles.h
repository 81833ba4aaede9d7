// What rank rows make of tokens, u = A x + a, in the processor's tile registers.
//
// Rank rows go in as they lie, [16 rows][32 inputs], and the tokens turned: for each pair of inputs, those of a block of
// tokens. Every output is summed over 32 inputs at a time, in order, whoever shares the registers.
#pragma once

#include "lanes.h"
#include "lines.h"
#include "rank_rows.h"
#include "tile_registers.h"
#include "words.h"

#ifdef HAS_TILE_REGISTERS

class ShrinkTiles {
public:
    // Blocks of tokens, one behind the other, each [d_in / 2 pairs][columns of 2 inputs]: a column a token, and zeros.
    struct Turned {
        const char* pairs;
        Index columns;
        Index num_blocks;

        Index stride() const { return columns * sizeof(uint32_t); }
    };

    explicit ShrinkTiles(const Tokens& tokens) : tokens_(tokens) {}

    // The tokens' pairs of inputs, until this thread turns others.
    Turned turn(Index token, Index num_tokens) const {
        const BFloat16* x = static_cast<const BFloat16*>(tokens_.x) + token * tokens_.x_stride;
        if (num_tokens == 1) return {reinterpret_cast<const char*>(x), 1, 1};
        static thread_local Lines<char> workspace;
        const Index columns = num_tokens == 2 ? 2 : TILE_ROWS, num_blocks = (num_tokens + TILE_ROWS - 1) / TILE_ROWS;
        const Index size = tokens_.d_in / 2 * columns * sizeof(uint32_t);
        char* pairs = workspace.make_room(num_blocks * size);
        if (num_tokens == 2) {
            turn_two(x, pairs);
        } else {
            for (Index block = 0; block < num_blocks; ++block)
                turn_block(x + block * TILE_ROWS * tokens_.x_stride,
                           std::min<Index>(num_tokens - block * TILE_ROWS, TILE_ROWS), pairs + block * size);
        }
        return {pairs, columns, num_blocks};
    }

    // take(token, row, count, u): what a token makes of a block of rank rows; `rows` and `bias` begin with the first.
    template <typename Take>
    void shrink(const Turned& turned, const BFloat16* rows, const BFloat16* bias, Index num_tokens, Index num_rows,
                const Take& take) const {
        Index row = 0;
        const auto some = [&](auto blocks, Index count) {
            shape(count, turned.columns);
            const Products products{turned, rows + row * tokens_.d_in, tokens_.d_in, bias ? bias + row : nullptr, count};
            by_all_tokens<decltype(blocks)::value>(products, num_tokens,
                                                   [&](Index token, Index r, const float* u) { take(token, row + r, count, u); });
            row += decltype(blocks)::value * count;
        };
        if (turned.num_blocks == 1)
            while (row + 4 * TILE_ROWS <= num_rows) some(std::integral_constant<int, 4>(), TILE_ROWS);
        while (row + 2 * TILE_ROWS <= num_rows) some(std::integral_constant<int, 2>(), TILE_ROWS);
        while (row < num_rows) some(std::integral_constant<int, 1>(), std::min<Index>(num_rows - row, TILE_ROWS));
        release_tiles();
    }

private:
    // Blocks of `count` rank rows by blocks of tokens.
    struct Products {
        const Turned& turned;
        const BFloat16* rows;
        Index d_in;
        const BFloat16* bias;
        Index count;
    };

    // Pairs of 16 inputs of both tokens, in turn.
    void turn_two(const BFloat16* x, char* pairs) const {
        const BFloat16* other = x + tokens_.x_stride;
        const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(WORDS / 2));
        for (Index input = 0; input < tokens_.d_in; input += TILE_DEPTH, pairs += 2 * TILE_BYTES) {
            const __m512i first = _mm512_loadu_si512(x + input), second = _mm512_loadu_si512(other + input);
            _mm512_store_si512(pairs, _mm512_permutex2var_epi32(first, low, second));
            _mm512_store_si512(pairs + TILE_BYTES, _mm512_permutex2var_epi32(first, high, second));
        }
    }

    void turn_block(const BFloat16* x, Index num_tokens, char* pairs) const {
        for (Index input = 0; input < tokens_.d_in; input += TILE_DEPTH, pairs += WORDS * TILE_BYTES) {
            __m512i words[WORDS];
#pragma GCC unroll 16
            for (Index t = 0; t < WORDS; ++t)
                words[t] = t < num_tokens ? _mm512_loadu_si512(x + t * tokens_.x_stride + input) : _mm512_setzero_si512();
            transpose(words);
#pragma GCC unroll 16
            for (Index i = 0; i < WORDS; ++i) _mm512_store_si512(pairs + i * TILE_BYTES, words[i]);
        }
    }

    // Registers: sums 0 to 3, rank rows 4 and 5, tokens 6 and 7.
    static void shape(Index num_rows, Index columns) {
        const auto shapes_of = [](Index bytes) {
            return shapes_by_rows(TILE_ROWS, [bytes](TileShapes& some, int num) {
                for (int tile : {0, 1, 2, 3}) some.set(tile, num, bytes);
                for (int tile : {4, 5}) some.set(tile, num);
                for (int tile : {6, 7}) some.set(tile, TILE_ROWS, bytes);
            });
        };
        static const auto one = shapes_of(4), two = shapes_of(8), all = shapes_of(TILE_BYTES);
        shape_tiles((columns == 1 ? one : columns == 2 ? two : all)[num_rows]);
    }

    template <int ROWS, typename Take>
    static void by_all_tokens(const Products& products, Index num_tokens, const Take& take) {
        constexpr Index MOST = 4 / ROWS;
        Index block = 0;
        for (; block + MOST <= products.turned.num_blocks; block += MOST)
            multiply<ROWS, MOST>(products, block, num_tokens, take);
        if constexpr (MOST == 4)
            for (; block + 2 <= products.turned.num_blocks; block += 2) multiply<ROWS, 2>(products, block, num_tokens, take);
        for (; block < products.turned.num_blocks; ++block) multiply<ROWS, 1>(products, block, num_tokens, take);
    }

    template <int ROWS, int TOKENS, typename Take>
    static void multiply(const Products& products, Index block, Index num_tokens, const Take& take) {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        const char* pairs = products.turned.pairs + block * products.d_in / 2 * products.turned.stride();
        for (Index input = 0; input < products.d_in; input += TILE_DEPTH, pairs += WORDS * products.turned.stride())
            add_products<ROWS, TOKENS>(products, products.rows + input, pairs);
        collect<ROWS, TOKENS>(products, block, num_tokens, take);
    }

    // Each block of tokens meets each block of rows; what stays in its registers is loaded once.
    template <int ROWS, int TOKENS, int SUMS = 0>
    static inline void add_products(const Products& products, const BFloat16* rows, const char* pairs) {
        if constexpr (SUMS < ROWS * TOKENS) {
            constexpr int TOKEN = SUMS / ROWS, ROW = SUMS % ROWS;
            const Index block_bytes = products.d_in / 2 * products.turned.stride();
            if constexpr (ROW == 0) load_tile<6 + TOKEN % 2>(pairs + TOKEN * block_bytes, products.turned.stride());
            if constexpr (TOKEN == 0)
                load_tile<4 + ROW % 2>(rows + ROW * TILE_ROWS * products.d_in, products.d_in * sizeof(BFloat16));
            add_pair_products<SUMS, 4 + ROW % 2, 6 + TOKEN % 2>();
            add_products<ROWS, TOKENS, SUMS + 1>(products, rows, pairs);
        }
    }

    template <int ROWS, int TOKENS, int SUMS = 0, typename Take>
    static void collect(const Products& products, Index block, Index num_tokens, const Take& take) {
        if constexpr (SUMS < ROWS * TOKENS) {
            constexpr Index ROW = SUMS % ROWS * TILE_ROWS;
            const Index token = (block + SUMS / ROWS) * TILE_ROWS;
            collect_tile<SUMS>(products.turned.columns, products.count, products.bias ? products.bias + ROW : nullptr,
                               std::min<Index>(num_tokens - token, TILE_ROWS),
                               [&](Index t, const float* u) { take(token + t, ROW, u); });
            collect<ROWS, TOKENS, SUMS + 1>(products, block, num_tokens, take);
        }
    }

    template <int SUMS, typename Take>
    static void collect_tile(Index columns, Index num_rows, const BFloat16* bias, Index num_tokens, const Take& take) {
        alignas(64) float u[TILE_ROWS][ROW_BLOCK];
        const __mmask16 there = (1u << num_rows) - 1;
        __m512i words[WORDS];
        if (columns == TILE_ROWS) {
            store_tile<SUMS>(u, sizeof u[0]);
#pragma GCC unroll 16
            for (int r = 0; r < WORDS; ++r) words[r] = _mm512_load_si512(u[r]);
            transpose(words);
        } else {
            alignas(64) float few[TILE_ROWS * 2];
            store_tile<SUMS>(few, columns * sizeof(float));
            const __m512i places = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            for (Index t = 0; t < columns; ++t)
                words[t] = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), there,
                                                       _mm512_mullo_epi32(places, _mm512_set1_epi32(columns)), few + t, 4);
        }
        Lanes offsets = {};
        if (bias) offsets = widen(_mm256_maskz_loadu_epi16(there, bias));
        for (Index t = 0; t < num_tokens; ++t) {
            store_lanes((Lanes)words[t] + offsets, u[t]);
            take(t, u[t]);
        }
    }

    const Tokens& tokens_;
};

#endif
