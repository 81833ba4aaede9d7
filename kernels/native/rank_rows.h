// Rank rows that meet tokens one by one, or a few: what every processor can do.
#pragma once

#include "dot.h"
#include "lanes.h"
#include "low_rank.h"

#include <algorithm>

// A resident's rank rows in a module, from `start` on.
struct ShrinkRows {
    const void* rows;
    const void* bias;  // or null
    Index start, extent;
};

// Some tokens of the batch by some rank rows of a resident.
struct Rectangle {
    Index token, num_tokens, row, num_rows;
};

// Some of a segment's tokens by some of its rank rows or, of several segments in a row, all tokens by all rank rows.
// What they weigh the first segment's rows with lies `weighted` numbers behind the part's first.
struct RankPiece {
    const Segment* segment;
    Index num_segments;
    Rectangle some;
    Index weighted;
};

constexpr Index ROW_BLOCK = 16;      // rank rows that read an input together
constexpr Index COLUMN_BLOCK = 256;  // outputs that are one piece of work
constexpr Index ROWS_AHEAD = 8;      // that are asked for early: they lie too far apart for the processor to guess

// y[token, columns] += sum_r weighted[token, r] B[r, columns] for TOKENS tokens and NUM_LANES * LANES columns.
template <int TOKENS, int NUM_LANES, typename Number>
static inline void expand_block(const float* weighted, Index num_rows, const Number* rows, Index d_out, Number* y,
                                Index y_stride) {
    Lanes sums[TOKENS][NUM_LANES];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < NUM_LANES; ++i) sums[t][i] = load_lanes(y + t * y_stride + i * LANES);
    for (Index r = 0; r < num_rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < NUM_LANES; ++i) {
            if (i % 2 == 0) __builtin_prefetch(rows + (r + ROWS_AHEAD) * d_out + i * LANES);
            const Lanes row = load_lanes(rows + r * d_out + i * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sums[t][i] += row * weighted[t * num_rows + r];
        }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < NUM_LANES; ++i) store_lanes(sums[t][i], y + t * y_stride + i * LANES);
}

// The columns [column, + count) of one token, where they do not fill registers.
template <typename Number>
static inline void expand_rest(const float* weighted, Index num_rows, const Number* rows, Index d_out, Number* y,
                               Index count) {
    for (Index i = 0; i < count; ++i) {
        float sum = to_float(y[i]);
        for (Index r = 0; r < num_rows; ++r) sum += weighted[r] * to_float(rows[r * d_out + i]);
        y[i] = from_float<Number>(sum);
    }
}

template <int TOKENS, typename Number>
static inline void expand_tokens(const float* weighted, Index num_rows, const Number* rows, Index d_out, Number* y,
                                 Index y_stride, Index count) {
    constexpr int NUM_LANES = TOKENS == 1 ? 8 : 4;
    Index column = 0;
    for (; column + NUM_LANES * LANES <= count; column += NUM_LANES * LANES)
        expand_block<TOKENS, NUM_LANES>(weighted, num_rows, rows + column, d_out, y + column, y_stride);
    for (; column + LANES <= count; column += LANES)
        expand_block<TOKENS, 1>(weighted, num_rows, rows + column, d_out, y + column, y_stride);
    for (int t = 0; t < TOKENS; ++t)
        expand_rest(weighted + t * num_rows, num_rows, rows + column, d_out, y + t * y_stride + column, count - column);
}

template <typename Number>
class RankRows {
public:
    explicit RankRows(const Tokens& tokens) : tokens_(tokens) {}

    // take(token, row, count, u): A x + a of a token with a block of the rank rows, both counted from the first.
    template <typename Take>
    void shrink(const ShrinkRows& all, const Rectangle& some, const Take& take) const {
        const Index d_in = tokens_.d_in, num_rows = some.num_rows, first_row = all.start + some.row;
        const Number* x = static_cast<const Number*>(tokens_.x) + some.token * tokens_.x_stride;
        for (Index row = 0; row < num_rows; row += ROW_BLOCK) {
            const Index count = std::min(ROW_BLOCK, num_rows - row);
            const Number* first = static_cast<const Number*>(all.rows) + (first_row + row) * d_in;
            for (Index t = 0; t < some.num_tokens; ++t) {
                const Number* token = x + t * tokens_.x_stride;
                float u[ROW_BLOCK];
                if (count == ROW_BLOCK)
                    dot_rows<ROW_BLOCK>(token, first, d_in, d_in, u);
                else
                    for (Index r = 0; r < count; ++r) dot_rows<1>(token, first + r * d_in, d_in, d_in, u + r);
                if (all.bias)
                    for (Index r = 0; r < count; ++r)
                        u[r] += to_float(static_cast<const Number*>(all.bias)[first_row + row + r]);
                take(t, row, count, u);
            }
        }
    }

    // Numbers that a segment's weighted products take, [num_tokens, num_rows].
    static Index weighted_size(const Segment& segment) { return segment.num_tokens * segment.num_rows; }

    static constexpr Index BLOCK_TOKENS = 16, ROW_BLOCKS_TOGETHER = 1;

    // Writes c u of a piece, which is of one segment, and exactly 0 where c is 0, whatever u is.
    void weigh(const RankPiece& piece, const LowRankPart& part, float* weighted) const {
        const Segment& s = *piece.segment;
        const Rectangle& some = piece.some;
        shrink({part.shrink_rows, part.shrink_bias, s.row_start, s.extent}, some,
               [&](Index token, Index row, Index count, const float* u) {
                   keep(s, some.token - s.token_start + token, some.row + row, count, u, weighted);
               });
    }

    // Keeps c u of a token, counted from the segment's first, for `count` rows: exactly 0 where c is 0, whatever u is.
    static void keep(const Segment& segment, Index token, Index row, Index count, const float* u, float* weighted) {
        const float* coefficients = segment.coefficients + token * segment.coefficient_stride + row;
        float* place = weighted + token * segment.num_rows + row;
        for (Index r = 0; r < count; ++r) place[r] = coefficients[r] == 0.0f ? 0.0f : coefficients[r] * u[r];
    }

    // Before tokens of a segment are kept one by one.
    static void clear(const Segment&, float*) {}

    // Adds a block of the part's outputs.
    static void expand(const WeighedRows& all, const WeighedPart& part, const Outputs& outputs, const Block& block) {
        const Additions& additions = all.additions;
        const float* weighted = part.weighted;
        for (Index s = 0; s < additions.num_segments; weighted += weighted_size(additions.segments[s++]))
            expand_segment(*part.part, outputs, additions.segments[s], block, weighted);
    }

    static const RankItems* items(const Additions&) { return nullptr; }

private:
    // Of a segment's tokens those that lie in the block, counted from its first.
    static void expand_segment(const LowRankPart& part, const Outputs& outputs, const Segment& segment, const Block& block,
                               const float* weighted) {
        const Index begin = std::max(segment.token_start, block.token);
        const Index end = std::min(segment.token_start + segment.num_tokens, block.token + block.num_tokens);
        if (begin >= end) return;
        Segment some = segment;
        some.token_start = begin - block.token;
        some.num_tokens = end - begin;
        add_columns(part, outputs, some, block.column, block.num_columns,
                    weighted + (begin - segment.token_start) * segment.num_rows);
    }

    // Columns [column, + count) for a segment's tokens.
    static void add_columns(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index column,
                            Index count, const float* weighted) {
        const Number* rows = static_cast<const Number*>(part.expand_rows) + segment.row_start * part.d_out + column;
        const Index num_rows = segment.num_rows;
        const auto some = [&](auto tokens, Index token) {
            expand_tokens<decltype(tokens)::value>(weighted + token * num_rows, num_rows, rows, part.d_out,
                                                   outputs.at<Number>(segment.token_start + token, column),
                                                   outputs.stride, count);
        };
        Index token = 0;
        for (; token + 4 <= segment.num_tokens; token += 4) some(std::integral_constant<int, 4>(), token);
        for (; token + 2 <= segment.num_tokens; token += 2) some(std::integral_constant<int, 2>(), token);
        for (; token < segment.num_tokens; ++token) some(std::integral_constant<int, 1>(), token);
    }

    const Tokens& tokens_;
};
