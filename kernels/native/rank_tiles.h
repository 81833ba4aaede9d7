// Rank rows that meet tokens in the processor's tile registers, 16 by 16.
//
// Shrinking takes rank rows as they lie, [16 rows][32 inputs], and the tokens turned: for each pair of inputs, those of a
// block of tokens. Expanding takes what the tokens weigh, and pairs of rank rows that are interleaved as they are read.
// The weights are rounded to bfloat16, as PEFT's are in a model of that type. Every sum is in the same order whoever shares
// the registers.
#pragma once

#include "panels.h"
#include "rank_rows.h"
#include "tile_registers.h"
#include "words.h"

#ifdef HAS_TILE_REGISTERS

#include <vector>

class RankTiles {
public:
    struct Turned {
        const void* pairs;
        Index stride;  // in bytes, from one pair to the next
    };

    static bool takes(const Tokens& tokens) { return tokens.d_in % TILE_DEPTH == 0 && may_use_tiles(); }

    explicit RankTiles(const Tokens& tokens) : tokens_(tokens), stride_(tokens.d_in * sizeof(BFloat16)) {}

    // The tokens' pairs of inputs, until this thread turns others: [d_in / 2][num_tokens, or a block of them].
    Turned turn(Index token, Index num_tokens) const {
        const BFloat16* x = static_cast<const BFloat16*>(tokens_.x) + token * tokens_.x_stride;
        if (num_tokens == 1) return {x, sizeof(uint32_t)};
        static thread_local std::vector<uint32_t> workspace;
        workspace.resize(std::max<size_t>(workspace.size(), tokens_.d_in / 2 * TOKEN_BLOCK));
        uint32_t* pairs = workspace.data();
        for (Index input = 0; input < tokens_.d_in; input += TILE_DEPTH, pairs += WORDS * TOKEN_BLOCK) {
            __m512i words[WORDS];
#pragma GCC unroll 16
            for (Index t = 0; t < WORDS; ++t)
                words[t] = t < num_tokens ? _mm512_loadu_si512(x + t * tokens_.x_stride + input) : _mm512_setzero_si512();
            transpose(words);
#pragma GCC unroll 16
            for (Index i = 0; i < WORDS; ++i) _mm512_storeu_si512(pairs + i * TOKEN_BLOCK, words[i]);
        }
        return {workspace.data(), TOKEN_BLOCK * sizeof(uint32_t)};
    }

    void shrink(const Turned& turned, const void* rows, Index num_tokens, Index row, Index num_rows, BlockProducts& u) const {
        TileShapes shapes;
        const Index bytes = num_tokens * sizeof(uint32_t);
        for (int tile : {0, 1, 2, 3}) shapes.set(tile, num_rows, bytes);
        for (int tile : {4, 5}) shapes.set(tile, num_rows);
        for (int tile : {6, 7}) shapes.set(tile, TILE_ROWS, bytes);
        shape_tiles(shapes);
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        const BFloat16* a = static_cast<const BFloat16*>(rows) + row * tokens_.d_in;
        const Index num_steps = tokens_.d_in / TILE_DEPTH;
        // In turn to four sums, because each addition waits for the one before.
        for (Index step = 0; step < num_steps; step += 4) {
            add_step<0, 4, 6>(a, turned, step);
            if (step + 1 < num_steps) add_step<1, 5, 7>(a, turned, step + 1);
            if (step + 2 < num_steps) add_step<2, 4, 6>(a, turned, step + 2);
            if (step + 3 < num_steps) add_step<3, 5, 7>(a, turned, step + 3);
        }
        collect(num_tokens, num_rows, u);
        release_tiles();
    }

    // In floats, for bfloat16 numbers [num_tokens, padded num_rows], zeros behind the rows.
    static Index weighted_size(const Segment& segment) { return segment.num_tokens * padded(segment.num_rows) / 2; }

    static void keep(const Segment& segment, Index token, Index row, Index count, const float* products, float* weighted) {
        const __m512 there = _mm512_maskz_loadu_ps((1u << count) - 1, products);
        auto* place = reinterpret_cast<BFloat16*>(weighted) + token * padded(segment.num_rows) + row;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), (__m256i)_mm512_cvtneps_pbh(there));
    }

    static void expand(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index column, Index count,
                       const float* products) {
        const auto* weighted = reinterpret_cast<const BFloat16*>(products);
        const Index end = column + count, rest = column + (end - column) / PANEL * PANEL;
        if (segment.num_tokens <= FEW_TOKENS) {
            expand_few(part, outputs, segment, column, rest, weighted);
        } else {
            Index at = column;
            for (; at + 4 * PANEL <= rest; at += 4 * PANEL) expand_panels<4>(part, outputs, segment, at, weighted);
            for (; at < rest; at += PANEL) expand_panels<1>(part, outputs, segment, at, weighted);
            release_tiles();
        }
        if (rest < end) expand_rest(part, outputs, segment, rest, end, weighted);
    }

private:
    struct alignas(64) Line {
        uint32_t words[WORDS];
    };

    static constexpr Index PAIRS = ROW_BLOCK / 2;
    static constexpr Index FEW_TOKENS = 2;  // that are expanded faster without

    static Index padded(Index num_rows) { return (num_rows + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK; }

    template <int SUMS, int A, int B>
    void add_step(const BFloat16* rows, const Turned& turned, Index step) const {
        load_tile<A>(rows + step * TILE_DEPTH, stride_);
        load_tile<B>(static_cast<const char*>(turned.pairs) + step * (TILE_DEPTH / 2) * turned.stride, turned.stride);
        add_pair_products<SUMS, A, B>();
    }

    static void collect(Index num_tokens, Index num_rows, BlockProducts& u) {
        alignas(64) float sums[4][ROW_BLOCK][TOKEN_BLOCK];
        store_tile<0>(sums[0], sizeof sums[0][0]);
        store_tile<1>(sums[1], sizeof sums[0][0]);
        store_tile<2>(sums[2], sizeof sums[0][0]);
        store_tile<3>(sums[3], sizeof sums[0][0]);
        for (Index t = 0; t < num_tokens; ++t)
            for (Index r = 0; r < num_rows; ++r)
                u[t][r] = (sums[0][r][t] + sums[1][r][t]) + (sums[2][r][t] + sums[3][r][t]);
    }

    // Columns [column, end) for few tokens, without the registers: to the same bits, in the order of their products, which sum
    // even and odd rows of a block apart. (Numbers below 1e-37 are not taken for zero here, as they are there.)
    static void expand_few(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index column, Index end,
                           const BFloat16* weighted) {
        Index token = 0;
        for (; token + 2 <= segment.num_tokens; token += 2)
            expand_wide<2>(part, outputs, segment, token, column, end, weighted);
        if (token < segment.num_tokens) expand_wide<1>(part, outputs, segment, token, column, end, weighted);
    }

    template <int TOKENS>
    static void expand_wide(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index token, Index column,
                            Index end, const BFloat16* weighted) {
        for (; column + 4 * PANEL <= end; column += 4 * PANEL)
            expand_some<TOKENS, 4>(part, outputs, segment, token, column, weighted);
        for (; column < end; column += PANEL) expand_some<TOKENS, 1>(part, outputs, segment, token, column, weighted);
    }

    template <int TOKENS, int PANELS>
    static void expand_some(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index token, Index column,
                            const BFloat16* weighted) {
        const Index width = padded(segment.num_rows);
        const BFloat16* rows =
            static_cast<const BFloat16*>(part.expand_rows) + segment.row_start * part.d_out + column;
        const BFloat16* weights = weighted + token * width;
        Lanes totals[TOKENS][PANELS] = {};
        for (Index first = 0; first < segment.num_rows; first += ROW_BLOCK) {
            const Index count = std::min(ROW_BLOCK, segment.num_rows - first);
            Lanes even[TOKENS][PANELS] = {}, odd[TOKENS][PANELS] = {};
            for (Index r = first; r < first + count; r += 2) {
                add_row(even, rows + r * part.d_out, part.d_out, weights + r, width);
                if (r + 1 < first + count) add_row(odd, rows + (r + 1) * part.d_out, part.d_out, weights + r + 1, width);
            }
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p) totals[t][p] += even[t][p] + odd[t][p];
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p) {
                BFloat16* here = outputs.at<BFloat16>(segment.token_start + token + t, column + p * PANEL);
                store_lanes(load_lanes(here) + totals[t][p], here);
            }
    }

    template <int TOKENS, int PANELS>
    static inline void add_row(Lanes (&sums)[TOKENS][PANELS], const BFloat16* row, Index d_out, const BFloat16* weights,
                               Index width) {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) {
            if (p % 2 == 0) __builtin_prefetch(row + ROWS_AHEAD * d_out + p * PANEL);
            const Lanes numbers = load_lanes(row + p * PANEL);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sums[t][p] += numbers * to_float(weights[t * width]);
        }
    }

    // Some panels of outputs from `column` on.
    template <int PANELS>
    static void expand_panels(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index column,
                              const BFloat16* weighted) {
        const Index width = padded(segment.num_rows), num_blocks = width / ROW_BLOCK;
        static thread_local std::vector<Line> workspace;
        workspace.resize(std::max<size_t>(workspace.size(), num_blocks * PANELS * PAIRS));
        Line* const pairs = workspace.data();  // [num_blocks][PANELS][PAIRS]
        for (Index block = 0; block < num_blocks; ++block)
            interleave_rows<PANELS>(part, segment, block, column, pairs + block * PANELS * PAIRS);
        Index shaped = 0;
        for (Index token = 0; token < segment.num_tokens; token += TOKEN_BLOCK) {
            const Index count = std::min(TOKEN_BLOCK, segment.num_tokens - token);
            if (count != shaped) shape_for_expanding(shaped = count);
            clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
            const BFloat16* weights = weighted + token * width;
            for (Index block = 0; block < num_blocks; ++block) {
                load_tile<4>(weights + block * ROW_BLOCK, width * sizeof(BFloat16));
                const Line* here = pairs + block * PANELS * PAIRS;
                add_panel<0, 6, PANELS>(here);
                add_panel<1, 7, PANELS>(here);
                add_panel<2, 6, PANELS>(here);
                add_panel<3, 7, PANELS>(here);
            }
            BFloat16* y = outputs.at<BFloat16>(segment.token_start + token, column);
            add_sums<0, PANELS>(y, outputs.stride, count);
            add_sums<1, PANELS>(y, outputs.stride, count);
            add_sums<2, PANELS>(y, outputs.stride, count);
            add_sums<3, PANELS>(y, outputs.stride, count);
        }
    }

    static void shape_for_expanding(Index num_tokens) {
        static const auto shapes = shapes_by_rows(TILE_ROWS, [](TileShapes& some, int num_rows) {
            for (int tile : {0, 1, 2, 3}) some.set(tile, num_rows);
            some.set(4, num_rows, ROW_BLOCK * sizeof(BFloat16));
            for (int tile : {6, 7}) some.set(tile, PAIRS);
        });
        shape_tiles(shapes[num_tokens]);
    }

    // pairs[panel][i] = rows 2 i and 2 i + 1 of a block, in turn; zeros where there is no row.
    template <int PANELS>
    static void interleave_rows(const LowRankPart& part, const Segment& segment, Index block, Index column, Line* pairs) {
        const Index first = block * ROW_BLOCK, count = std::min(ROW_BLOCK, segment.num_rows - first);
        const BFloat16* rows =
            static_cast<const BFloat16*>(part.expand_rows) + (segment.row_start + first) * part.d_out + column;
        const auto row = [&](Index r, Index offset) {
            return r < count ? load_row(rows + r * part.d_out + offset, PANELS * PANEL - offset) : _mm512_setzero_si512();
        };
        for (Index i = 0; i < PAIRS; ++i)
            for (Index panel = 0; panel < PANELS; panel += 2) {
                __m512i some, others;
                interleave(row(2 * i, panel * PANEL), row(2 * i + 1, panel * PANEL), &some, &others);
                _mm512_store_si512(&pairs[panel * PAIRS + i], some);
                if (panel + 1 < PANELS) _mm512_store_si512(&pairs[(panel + 1) * PAIRS + i], others);
            }
    }

    template <int P, int TILE, int PANELS>
    static void add_panel(const Line* pairs) {
        if constexpr (P < PANELS) {
            load_tile<TILE>(pairs + P * PAIRS, sizeof(Line));
            add_pair_products<P, 4, TILE>();
        }
    }

    template <int P, int PANELS>
    static void add_sums(BFloat16* y, Index y_stride, Index count) {
        if constexpr (P < PANELS) {
            alignas(64) float sums[TOKEN_BLOCK][PANEL];
            store_tile<P>(sums, sizeof sums[0]);
            for (Index t = 0; t < count; ++t) {
                BFloat16* here = y + t * y_stride + P * PANEL;
                store_lanes(load_lanes(here) + load_lanes(sums[t]), here);
            }
        }
    }

    // The last columns, fewer than 16.
    static void expand_rest(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index begin, Index end,
                            const BFloat16* weighted) {
        const Index width = padded(segment.num_rows);
        const BFloat16* rows = static_cast<const BFloat16*>(part.expand_rows) + segment.row_start * part.d_out;
        for (Index t = 0; t < segment.num_tokens; ++t) {
            const BFloat16* weights = weighted + t * width;
            BFloat16* y = outputs.at<BFloat16>(segment.token_start + t, 0);
            for (Index i = begin; i < end; ++i) {
                float sum = to_float(y[i]);
                for (Index r = 0; r < segment.num_rows; ++r)
                    sum += to_float(weights[r]) * to_float(rows[r * part.d_out + i]);
                y[i] = from_float<BFloat16>(sum);
            }
        }
    }

    const Tokens& tokens_;
    const Index stride_;  // in bytes, from one rank row to the next
};

#endif
