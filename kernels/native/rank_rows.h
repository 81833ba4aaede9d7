// Rank rows that meet tokens one by one, or a few: what every processor can do.
#pragma once

#include "dot.h"
#include "lanes.h"
#include "low_rank.h"

#include <algorithm>

constexpr Index ROW_BLOCK = 16;      // rank rows that read an input together
constexpr Index TOKEN_BLOCK = 16;    // tokens that meet them in one piece of work
constexpr Index COLUMN_BLOCK = 256;  // outputs that are one piece of work
constexpr Index ROWS_AHEAD = 8;      // that are asked for early: they lie too far apart for the processor to guess

// What a block of rank rows makes of a block of tokens.
typedef float BlockProducts[TOKEN_BLOCK][ROW_BLOCK];

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
    // Tokens as `shrink` takes them.
    using Turned = const Number*;

    explicit RankRows(const Tokens& tokens) : tokens_(tokens) {}

    Turned turn(Index token, Index) const { return static_cast<const Number*>(tokens_.x) + token * tokens_.x_stride; }

    // u[t][r] = A_r x_t for a block of tokens and rank rows from `row`, a block of them at most.
    void shrink(Turned x, const void* rows, Index num_tokens, Index row, Index num_rows, BlockProducts& u) const {
        const Index d_in = tokens_.d_in;
        const Number* first = static_cast<const Number*>(rows) + row * d_in;
        for (Index t = 0; t < num_tokens; ++t, x += tokens_.x_stride) {
            if (num_rows == ROW_BLOCK)
                dot_rows<ROW_BLOCK>(x, first, d_in, d_in, u[t]);
            else
                for (Index r = 0; r < num_rows; ++r) dot_rows<1>(x, first + r * d_in, d_in, d_in, u[t] + r);
        }
    }

    // Numbers that a segment's weighted products take, [num_tokens, num_rows].
    static Index weighted_size(const Segment& segment) { return segment.num_tokens * segment.num_rows; }

    // Keeps the products of a token of the segment with its rank rows [row, + count).
    static void keep(const Segment& segment, Index token, Index row, Index count, const float* products, float* weighted) {
        std::copy(products, products + count, weighted + token * segment.num_rows + row);
    }

    // Columns [column, + count) of the part for a segment's tokens.
    static void expand(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index column, Index count,
                       const float* weighted) {
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

private:
    const Tokens& tokens_;
};
