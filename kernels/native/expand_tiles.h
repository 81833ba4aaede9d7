// What rank rows add to outputs, y += w B, in the processor's tile registers.
//
// A product takes what 16 tokens weigh 32 rank rows with, and pairs of rows that are interleaved as they are read. Every
// sum is in the same order whoever shares the registers, and whether or not they are used.
#pragma once

#include "lines.h"
#include "low_rank.h"
#include "panels.h"
#include "rank_rows.h"
#include "tile_registers.h"
#include "words.h"

#ifdef HAS_TILE_REGISTERS

class ExpandTiles {
public:
    // `weighted` [num_tokens, width], width a multiple of 16 and zeros behind the segment's rows.
    ExpandTiles(const LowRankPart& part, const Outputs& outputs, const Segment& segment, const BFloat16* weighted, Index width)
        : outputs_(outputs),
          rows_(static_cast<const BFloat16*>(part.expand_rows) + segment.row_start * part.d_out),
          d_out_(part.d_out),
          first_token_(segment.token_start),
          num_tokens_(segment.num_tokens),
          num_rows_(segment.num_rows),
          weighted_(weighted),
          width_(width) {}

    // Adds columns [column, end).
    void add(Index column, Index end) const {
        const Index rest = column + (end - column) / PANEL * PANEL;
        if (num_tokens_ <= FEW_TOKENS) {
            add_to_few(column, rest);
        } else {
            for (; column + 4 * PANEL <= rest; column += 4 * PANEL) add_panels<4>(column);
            for (; column < rest; column += PANEL) add_panels<1>(column);
            release_tiles();
        }
        if (rest < end) add_rest(rest, end);
    }

private:
    struct alignas(64) Line {
        uint32_t words[WORDS];
    };

    static constexpr Index ROWS = 32;       // rank rows that a product takes
    static constexpr Index FEW_TOKENS = 2;  // for which vectors are faster

    // Columns for few tokens, without the registers: to the same bits, in the order of their products, which sum even and
    // odd rows of a block apart. (Numbers below 1e-37 are not taken for zero here, as they are there.)
    void add_to_few(Index column, Index end) const {
        Index token = 0;
        for (; token + 2 <= num_tokens_; token += 2) add_wide<2>(token, column, end);
        if (token < num_tokens_) add_wide<1>(token, column, end);
    }

    template <int TOKENS>
    void add_wide(Index token, Index column, Index end) const {
        for (; column + 4 * PANEL <= end; column += 4 * PANEL) add_some<TOKENS, 4>(token, column);
        for (; column < end; column += PANEL) add_some<TOKENS, 1>(token, column);
    }

    template <int TOKENS, int PANELS>
    void add_some(Index token, Index column) const {
        const BFloat16* rows = rows_ + column;
        const BFloat16* weights = weighted_ + token * width_;
        Lanes totals[TOKENS][PANELS] = {};
        for (Index first = 0; first < num_rows_; first += ROWS) {
            const Index last = std::min(first + ROWS, num_rows_);
            Lanes even[TOKENS][PANELS] = {}, odd[TOKENS][PANELS] = {};
            for (Index r = first; r < last; r += 2) {
                add_row(even, rows + r * d_out_, weights + r);
                if (r + 1 < last) add_row(odd, rows + (r + 1) * d_out_, weights + r + 1);
            }
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 4
                for (int p = 0; p < PANELS; ++p) totals[t][p] += even[t][p] + odd[t][p];
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p) {
                BFloat16* here = outputs_.at<BFloat16>(first_token_ + token + t, column + p * PANEL);
                store_lanes(load_lanes(here) + totals[t][p], here);
            }
    }

    template <int TOKENS, int PANELS>
    void add_row(Lanes (&sums)[TOKENS][PANELS], const BFloat16* row, const BFloat16* weights) const {
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) {
            if (p % 2 == 0) __builtin_prefetch(row + ROWS_AHEAD * d_out_ + p * PANEL);
            const Lanes numbers = load_lanes(row + p * PANEL);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sums[t][p] += numbers * to_float(weights[t * width_]);
        }
    }

    // Registers: sums 0 to 3; weights 4 and pairs of rows 6, or 5 and 7 of the last 16 rows, where they are not 32.
    template <int PANELS>
    void add_panels(Index column) const {
        const Index num_pairs = width_ / 2, whole = width_ / ROWS * ROWS;
        static thread_local Lines<Line> workspace;
        Line* const pairs = workspace.make_room(PANELS * num_pairs);  // [PANELS][num_pairs]
        interleave_rows<PANELS>(column, pairs);
        Index shaped = 0;
        for (Index token = 0; token < num_tokens_; token += TILE_ROWS) {
            const Index count = std::min<Index>(num_tokens_ - token, TILE_ROWS);
            if (count != shaped) shape(shaped = count);
            clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
            const BFloat16* weights = weighted_ + token * width_;
            for (Index row = 0; row < whole; row += ROWS) add_rows<4, 6, PANELS>(weights + row, pairs + row / 2);
            if (whole < width_) add_rows<5, 7, PANELS>(weights + whole, pairs + whole / 2);
            BFloat16* y = outputs_.at<BFloat16>(first_token_ + token, column);
            if constexpr (PANELS == 4) {
                add_two_sums<0, 1>(y, count);
                add_two_sums<2, 3>(y + 2 * PANEL, count);
            } else {
                add_sums<0>(y, count);
            }
        }
    }

    static void shape(Index num_tokens) {
        static const auto shapes = shapes_by_rows(TILE_ROWS, [](TileShapes& some, int num_rows) {
            for (int tile : {0, 1, 2, 3, 4}) some.set(tile, num_rows);
            some.set(5, num_rows, TILE_BYTES / 2);
            some.set(6, ROWS / 2);
            some.set(7, ROWS / 4);
        });
        shape_tiles(shapes[num_tokens]);
    }

    // pairs[panel][i] = rows 2 i and 2 i + 1, in turn; zeros where there is no row.
    template <int PANELS>
    void interleave_rows(Index column, Line* pairs) const {
        const Index num_pairs = width_ / 2;
        const auto row = [&](Index r, Index offset) {
            return r < num_rows_ ? load_row(rows_ + r * d_out_ + column + offset, PANELS * PANEL - offset)
                                 : _mm512_setzero_si512();
        };
        for (Index i = 0; i < num_pairs; ++i)
            for (Index panel = 0; panel < PANELS; panel += 2) {
                __m512i some, others;
                interleave(row(2 * i, panel * PANEL), row(2 * i + 1, panel * PANEL), &some, &others);
                _mm512_store_si512(&pairs[panel * num_pairs + i], some);
                if (panel + 1 < PANELS) _mm512_store_si512(&pairs[(panel + 1) * num_pairs + i], others);
            }
    }

    template <int WEIGHTS, int TILE, int PANELS>
    void add_rows(const BFloat16* weights, const Line* pairs) const {
        load_tile<WEIGHTS>(weights, width_ * sizeof(BFloat16));
        add_panel<0, WEIGHTS, TILE, PANELS>(pairs);
        add_panel<1, WEIGHTS, TILE, PANELS>(pairs);
        add_panel<2, WEIGHTS, TILE, PANELS>(pairs);
        add_panel<3, WEIGHTS, TILE, PANELS>(pairs);
    }

    template <int P, int WEIGHTS, int TILE, int PANELS>
    void add_panel(const Line* pairs) const {
        if constexpr (P < PANELS) {
            load_tile<TILE>(pairs + P * (width_ / 2), sizeof(Line));
            add_pair_products<P, WEIGHTS, TILE>();
        }
    }

    template <int SUMS>
    void add_sums(BFloat16* y, Index count) const {
        alignas(64) float sums[TILE_ROWS][PANEL];
        store_tile<SUMS>(sums, sizeof sums[0]);
        for (Index t = 0; t < count; ++t, y += outputs_.stride) store_lanes(load_lanes(y) + load_lanes(sums[t]), y);
    }

    // Two panels, whose columns are a line.
    template <int LEFT, int RIGHT>
    void add_two_sums(BFloat16* y, Index count) const {
        alignas(64) float left[TILE_ROWS][PANEL], right[TILE_ROWS][PANEL];
        store_tile<LEFT>(left, sizeof left[0]);
        store_tile<RIGHT>(right, sizeof right[0]);
        for (Index t = 0; t < count; ++t, y += outputs_.stride) {
            const Lanes a = load_lanes(y) + load_lanes(left[t]), b = load_lanes(y + PANEL) + load_lanes(right[t]);
            _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
        }
    }

    // The last columns, fewer than 16.
    void add_rest(Index begin, Index end) const {
        for (Index t = 0; t < num_tokens_; ++t) {
            const BFloat16* weights = weighted_ + t * width_;
            BFloat16* y = outputs_.at<BFloat16>(first_token_ + t, 0);
            for (Index i = begin; i < end; ++i) {
                float sum = to_float(y[i]);
                for (Index r = 0; r < num_rows_; ++r) sum += to_float(weights[r]) * to_float(rows_[r * d_out_ + i]);
                y[i] = from_float<BFloat16>(sum);
            }
        }
    }

    const Outputs& outputs_;
    const BFloat16* rows_;  // of the segment
    Index d_out_, first_token_, num_tokens_, num_rows_;
    const BFloat16* weighted_;
    Index width_;
};

#endif
