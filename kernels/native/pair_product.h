// The product with the processor's pairwise one: 16 outputs take a pair of inputs each. Sums of 8 tokens by 3 panels fill
// the registers and are multiplied fastest; those of 16 tokens by a panel leave half of them.
#pragma once

#include "pair_sums.h"
#include "panels.h"
#include "tokens.h"

#ifdef __AVX512BF16__
#define HAS_PAIR_PRODUCT 1

struct PairProduct {
    using Number = BFloat16;
    static constexpr bool SHARES_TOKENS = false, ADDS_RANK_ROWS = true;
    static constexpr Index TILE_PANELS = 3;
    static constexpr int MOST_TOKENS = 8, MOST_BY_A_PANEL = 16;
    static_assert(FEW_TOKENS <= MOST_BY_A_PANEL);
    const uint16_t* x;
    Index num_tokens, d_in, x_stride;

    explicit PairProduct(const Tokens& tokens)
        : x(static_cast<const uint16_t*>(tokens.x)),
          num_tokens(tokens.num_tokens),
          d_in(tokens.d_in),
          x_stride(tokens.x_stride) {}

    Index unit() const { return takes_single_panels(*this) ? 1 : TILE_PANELS; }

    // Few tokens' sums of single panels meet rank rows together.
    void panels(const LinearPart& part, Index first, Index count) const {
        if (!part.rows || !takes_single_panels(*this)) return few_by_few(*this, part, first, count);
        const PairSums rows{RankSums::of(*part.rows)};
        RankAhead ahead(rows, 0, first, count, count * num_steps());
        __m512 sums[MOST_BY_A_PANEL * TILE_PANELS];
        for (Index p = 0; p < count; ++p)
            tile_of_tokens<1, MOST_BY_A_PANEL>(Kept{*this, &ahead, sums + p, count}, part, 0, num_tokens, first + p);
        rows.add(0, num_tokens, first, count, sums);
        store(sums, part, {0, num_tokens, first, count});
    }

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        if (!part.rows) return add_pairs<TOKENS, PANELS>(part, token, panel, {*this, nullptr, nullptr, 0});
        const PairSums rows{RankSums::of(*part.rows)};
        RankAhead ahead(rows, token / TOKENS_IN_BLOCK, panel, PANELS, num_steps());
        __m512 sums[TOKENS * PANELS];
        add_pairs<TOKENS, PANELS>(part, token, panel, {*this, &ahead, sums, PANELS});
        rows.add(token, TOKENS, panel, PANELS, sums);
        store(sums, part, {token, TOKENS, panel, PANELS});
    }

private:
    static constexpr Index STEP = 16;  // pairs of inputs

    // Where sums are kept for rank rows, [tokens][stride], and what is asked for until then; or nothing.
    struct Kept {
        const PairProduct& product;
        RankAhead* ahead;
        __m512* sums;
        Index stride;

        template <int TOKENS, int PANELS>
        void tile(const LinearPart& part, Index token, Index panel) const {
            product.add_pairs<TOKENS, PANELS>(part, token, panel, *this);
        }
    };

    Index num_steps() const { return (d_in / 2 + STEP - 1) / STEP; }

    template <int TOKENS, int PANELS>
    void add_pairs(const LinearPart& part, Index token, Index panel, const Kept& kept) const {
        constexpr int FOURS = (TOKENS + 3) / 4;
        const Index num_pairs = d_in / 2, panel_bytes = d_in * PANEL * static_cast<Index>(sizeof(uint16_t));
        const uint16_t* weights = static_cast<const uint16_t*>(part.weights) + panel * d_in * PANEL;
        const uint16_t* fours[FOURS];
#pragma GCC unroll 4
        for (int four = 0; four < FOURS; ++four) {
            fours[four] = x + (token + 4 * four) * x_stride;
            asm("" : "+r"(fours[four]));  // else the compiler keeps the addresses of all tokens
        }
        LinesAhead ahead;
        if constexpr (PANELS > 1)
            ahead = panels_ahead(*this, token, weights + PANELS * num_pairs * 2 * PANEL, PANELS * panel_bytes, num_steps());
        const Index strides[] = {0, x_stride, 2 * x_stride, 3 * x_stride};
        __m512 sums[TOKENS][PANELS] = {};
        for (Index step = 0; step < num_pairs; step += STEP) {
            if (kept.ahead) kept.ahead->ask();
            ahead.ask();
#pragma GCC unroll 2
            for (Index pair = step; pair < std::min(step + STEP, num_pairs); ++pair) {
                __m512bh panels[PANELS];
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) {
                    const uint16_t* here = weights + (p * num_pairs + pair) * 2 * PANEL;
                    panels[p] = (__m512bh)_mm512_loadu_si512(here);
                    if (token == 0)
                        prefetch_panel<PANELS == 1>(here, panel_bytes - (pair + 1) * 64, panel_bytes, PANELS);
                }
#pragma GCC unroll 16
                for (int t = 0; t < TOKENS; ++t) {
                    const __m512bh inputs = broadcast_pair(fours[t / 4] + strides[t % 4] + 2 * pair);
#pragma GCC unroll 3
                    for (int p = 0; p < PANELS; ++p) sums[t][p] = _mm512_dpbf16_ps(sums[t][p], inputs, panels[p]);
                }
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p)
                if (kept.sums)
                    kept.sums[t * kept.stride + p] = sums[t][p];
                else
                    finish<BFloat16>((Lanes)sums[t][p], part, token + t, (panel + p) * PANEL);
    }

    // Sums [tokens][panels]; the block's columns are panels.
    static void store(const __m512* sums, const LinearPart& part, const Block& block) {
        for (Index t = 0; t < block.num_tokens; ++t)
            for (Index p = 0; p < block.num_columns; ++p, ++sums)
                finish<BFloat16>((Lanes)*sums, part, block.token + t, (block.column + p) * PANEL);
    }
};

#endif
