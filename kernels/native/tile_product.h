// The product for processors with tile registers, which multiply 16 tokens by 16 outputs over 32 inputs at once.
//
// A panel is, 16 pairs of inputs at a time, just what a register takes. Up to 16 tokens meet four panels, because reading
// weights is what takes long; more meet two at a time, 32 tokens to each, because multiplying is. Of these panels as much
// of the depth is taken for many tokens in turn as stays in the nearest cache, and the sums are kept aside. Either way an
// output is summed in the same order, the inputs first, then what adapters add.
#pragma once

#include "lines.h"
#include "panels.h"
#include "tile_registers.h"
#include "tile_sums.h"
#include "tokens.h"

#ifdef HAS_TILE_REGISTERS

struct TileProduct {
    using Number = BFloat16;
    static constexpr bool SHARES_TOKENS = true, ADDS_RANK_ROWS = true;
    static constexpr Index TILE_PANELS = 4;
    static constexpr Index WEIGHTS_STRIDE = 2 * PANEL * sizeof(uint16_t);
    const uint16_t* x;
    Index num_tokens, d_in, x_stride;
    Index first_token = 0;  // of the batch, a multiple of 16

    explicit TileProduct(const Tokens& tokens)
        : x(static_cast<const uint16_t*>(tokens.x)),
          num_tokens(tokens.num_tokens),
          d_in(tokens.d_in),
          x_stride(tokens.x_stride) {}

    struct Share;

    // With the tokens [token, + count) alone, for the calling thread, whose registers are in shape until it goes.
    Share share(Index token, Index count) const;

    // Few tokens take single panels well, many take two.
    Index unit() const { return num_tokens <= TILE_ROWS ? 1 : TILE_PANELS; }

    void panels(const LinearPart& part, Index first, Index count) const {
        if (num_tokens <= TILE_ROWS) {
            if (count == 4) few_tokens<4>(part, first);
            if (count == 3) few_tokens<3>(part, first);
            if (count == 2) few_tokens<2>(part, first);
            if (count == 1) few_tokens<1>(part, first);
        } else {
            for (Index panel = first; panel < first + count; panel += 2)
                panel + 2 <= first + count ? many_tokens<2>(part, panel) : many_tokens<1>(part, panel);
        }
    }

private:
    // Asks for the panels behind those at hand, over all blocks of tokens.
    LinesAhead panels_ahead(const LinearPart& part, Index panel, Index num_panels) const {
        const Index num_blocks = (num_tokens + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS);
        return {reinterpret_cast<const char*>(weights_of(part, panel)), (num_panels * TILE_ROWS + num_blocks - 1) / num_blocks};
    }

    const uint16_t* weights_of(const LinearPart& part, Index panel) const {
        return static_cast<const uint16_t*>(part.weights) + panel * d_in * PANEL;
    }

    // Registers: sums 0 to 3, tokens 4, weights 5.
    template <int PANELS>
    void few_tokens(const LinearPart& part, Index first) const {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        const uint16_t* weights = weights_of(part, first);
        const TileSums rows{part.rows ? RankSums::of(*part.rows) : RankSums{}};
        RankAhead ahead(rows, first_token / TILE_ROWS, first, PANELS, d_in / TILE_DEPTH);
        for (Index input = 0; input < d_in; input += TILE_DEPTH) {
            ahead.ask();
            load_tile<4>(x + input, x_stride * sizeof(uint16_t));
            next<0, PANELS>(weights, input);
            next<1, PANELS>(weights, input);
            next<2, PANELS>(weights, input);
            next<3, PANELS>(weights, input);
        }
        rows.add<0, 4, 5, PANELS, 6, 7>(first_token / TILE_ROWS, first);
        store<0, PANELS>(part, 0, num_tokens, first);
        store<1, PANELS>(part, 0, num_tokens, first + 1);
        store<2, PANELS>(part, 0, num_tokens, first + 2);
        store<3, PANELS>(part, 0, num_tokens, first + 3);
    }

    template <int P, int PANELS>
    void next(const uint16_t* weights, Index input) const {
        if constexpr (P < PANELS) {
            const uint16_t* here = weights + (P * d_in + input) * PANEL;
            for (int row = 0; row < TILE_ROWS; ++row)
                prefetch_panel(here + row * 2 * PANEL, (d_in - input) * PANEL * 2 - (row + 1) * 64, d_in * PANEL * 2, PANELS);
            load_tile<5>(here, WEIGHTS_STRIDE);
            add_pair_products<P, 4, 5>();
        }
    }

    static constexpr Index ASIDE_TOKENS = 256;  // whose sums are kept aside; for fewer it does not pay
    static constexpr Index MOST_DEPTH = 640;    // inputs of two panels that stay in the nearest cache, 40 KB

    struct alignas(64) Sums {
        float of[4][TILE_ROWS][PANEL];
    };

    // Registers: sums 0 to 3, tokens 4 and 5, weights 6 and 7.
    template <int PANELS>
    void many_tokens(const LinearPart& part, Index first) const {
        const Index num_depths = num_tokens < ASIDE_TOKENS ? 1 : (d_in + MOST_DEPTH - 1) / MOST_DEPTH;
        const Index depth = (d_in / TILE_DEPTH + num_depths - 1) / num_depths * TILE_DEPTH;
        static thread_local Lines<Sums> kept;
        Sums* sums = kept.make_room(ASIDE_TOKENS / (2 * TILE_ROWS));
        LinesAhead ahead = panels_ahead(part, first + PANELS, PANELS);
        for (Index token = 0; token < num_tokens; token += ASIDE_TOKENS) {
            const Index end = std::min(token + ASIDE_TOKENS, num_tokens);
            for (Index input = 0; input < d_in; input += depth)
                by_depth<PANELS>(part, first, token, end, input, std::min(input + depth, d_in), sums, ahead);
        }
    }

    // Tokens [token, end), whose sums lie aside unless they begin or end here.
    template <int PANELS>
    void by_depth(const LinearPart& part, Index first, Index token, Index end, Index input, Index last_input, Sums* sums,
                  LinesAhead& ahead) const {
        Index shaped = -1;
        for (; token < end; token += 2 * TILE_ROWS, ++sums) {
            const Index left = std::min<Index>(num_tokens - token, 2 * TILE_ROWS);
            if (left != shaped) shape_for_many(shaped = left);
            left > TILE_ROWS ? block<2, PANELS>(part, first, token, left, input, last_input, *sums, ahead)
                             : block<1, PANELS>(part, first, token, left, input, last_input, *sums, ahead);
        }
    }

    static void shape_for_many(Index num) {
        static const auto shapes = shapes_by_rows(2 * TILE_ROWS, [](TileShapes& some, int num_rows) {
            const int upper = std::min(num_rows, TILE_ROWS), lower = std::max(num_rows - TILE_ROWS, 1);
            for (int tile : {0, 1, 4}) some.set(tile, upper);
            for (int tile : {2, 3, 5}) some.set(tile, lower);
            for (int tile : {6, 7}) some.set(tile, TILE_ROWS);
        });
        shape_tiles(shapes[num]);
    }

    template <int BLOCKS, int PANELS>
    void block(const LinearPart& part, Index first, Index token, Index num, Index begin, Index end, Sums& sums,
               LinesAhead& ahead) const {
        const uint16_t* weights = weights_of(part, first);
        const uint16_t* upper = x + token * x_stride;
        const uint16_t* lower = upper + TILE_ROWS * x_stride;
        const Index stride = x_stride * sizeof(uint16_t);
        if (begin == 0) {
            clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        } else {
            load_tile<0>(sums.of[0], TILE_BYTES), load_tile<1>(sums.of[1], TILE_BYTES);
            load_tile<2>(sums.of[2], TILE_BYTES), load_tile<3>(sums.of[3], TILE_BYTES);
        }
        for (Index input = begin; input < end; input += TILE_DEPTH) {
            ahead.ask();
            load_tile<6>(weights + input * PANEL, WEIGHTS_STRIDE);
            if constexpr (PANELS == 2) load_tile<7>(weights + (d_in + input) * PANEL, WEIGHTS_STRIDE);
            load_tile_once<4>(upper + input, stride);
            if constexpr (BLOCKS == 2) load_tile_once<5>(lower + input, stride);
            add_pair_products<0, 4, 6>();
            if constexpr (PANELS == 2) add_pair_products<1, 4, 7>();
            if constexpr (BLOCKS == 2) add_pair_products<2, 5, 6>();
            if constexpr (BLOCKS == 2 && PANELS == 2) add_pair_products<3, 5, 7>();
        }
        if (end < d_in) {
            store_tile<0>(sums.of[0], TILE_BYTES), store_tile<1>(sums.of[1], TILE_BYTES);
            store_tile<2>(sums.of[2], TILE_BYTES), store_tile<3>(sums.of[3], TILE_BYTES);
            return;
        }
        if (part.rows) {
            const Index number = (first_token + token) / TILE_ROWS;
            const TileSums rows{RankSums::of(*part.rows)};
            rows.add<0, 4, 6, PANELS>(number, first);
            if constexpr (BLOCKS == 2) rows.add<2, 5, 6, PANELS>(number + 1, first);
        }
        const Index num_upper = std::min<Index>(num, TILE_ROWS), num_lower = num - num_upper;
        if constexpr (PANELS == 2) {
            store_two<0, 1>(part, token, num_upper, first);
            if constexpr (BLOCKS == 2) store_two<2, 3>(part, token + TILE_ROWS, num_lower, first);
        } else {
            store<0, 2>(part, token, num_upper, first);
            if constexpr (BLOCKS == 2) store<2, 4>(part, token + TILE_ROWS, num_lower, first);
        }
    }

    // What `finish` does for two panels, so that rows are stored in whole lines.
    template <int LEFT, int RIGHT>
    static void store_two(const LinearPart& part, Index token, Index num, Index panel) {
        alignas(64) float left[TILE_ROWS][PANEL], right[TILE_ROWS][PANEL];
        store_tile<LEFT>(left, sizeof left[0]);
        store_tile<RIGHT>(right, sizeof right[0]);
        const auto* bias = static_cast<const BFloat16*>(part.bias);
        BFloat16* y = static_cast<BFloat16*>(part.y) + token * part.y_stride + panel * PANEL;
        for (Index t = 0; t < num; ++t, y += part.y_stride) {
            Lanes a = load_lanes(left[t]), b = load_lanes(right[t]);
            if (bias) a += load_lanes(bias + panel * PANEL), b += load_lanes(bias + (panel + 1) * PANEL);
            if (part.add) a += load_lanes(y), b += load_lanes(y + PANEL);
            _mm512_storeu_si512(y, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
        }
    }

    template <int TILE, int TILES>
    static void store(const LinearPart& part, Index token, Index num, Index panel) {
        if constexpr (TILE < TILES) {
            alignas(64) float sums[TILE_ROWS][PANEL];
            store_tile<TILE>(sums, sizeof sums[0]);
            for (Index t = 0; t < num; ++t) finish<BFloat16>(load_lanes(sums[t]), part, token + t, panel * PANEL);
        }
    }
};

struct TileProduct::Share : TileProduct {
    explicit Share(const TileProduct& some) : TileProduct(some) {
        if (num_tokens <= TILE_ROWS) shape_for_block(num_tokens);
    }
    ~Share() { release_tiles(); }
    Share(const Share&) = delete;
};

inline TileProduct::Share TileProduct::share(Index token, Index count) const {
    TileProduct some({x + token * x_stride, count, d_in, x_stride});
    some.first_token = token;
    return Share(some);
}

#endif
