// The product with the processor's pairwise one: 16 outputs take a pair of inputs each. Sums of 8 tokens by 3 panels fill
// the registers and are multiplied fastest; those of 16 tokens by a panel leave half of them.
#pragma once

#include "panels.h"
#include "tokens.h"

#ifdef __AVX512BF16__
#define HAS_PAIR_PRODUCT 1

struct PairProduct {
    using Number = BFloat16;
    static constexpr bool SHARES_TOKENS = false, ADDS_RANK_ROWS = false;
    static constexpr Index TILE_PANELS = 3;
    static constexpr int MOST_TOKENS = 8, MOST_BY_A_PANEL = 16;
    const uint16_t* x;
    Index num_tokens, d_in, x_stride;

    explicit PairProduct(const Tokens& tokens)
        : x(static_cast<const uint16_t*>(tokens.x)),
          num_tokens(tokens.num_tokens),
          d_in(tokens.d_in),
          x_stride(tokens.x_stride) {}

    Index unit() const { return takes_single_panels(*this) ? 1 : TILE_PANELS; }

    void panels(const LinearPart& part, Index first, Index count) const { few_by_few(*this, part, first, count); }

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        constexpr int FOURS = (TOKENS + 3) / 4;
        const Index num_pairs = d_in / 2, panel_bytes = d_in * PANEL * static_cast<Index>(sizeof(uint16_t));
        const uint16_t* weights = static_cast<const uint16_t*>(part.weights) + panel * d_in * PANEL;
        const uint16_t* fours[FOURS];
#pragma GCC unroll 4
        for (int four = 0; four < FOURS; ++four) {
            fours[four] = x + (token + 4 * four) * x_stride;
            asm("" : "+r"(fours[four]));  // else the compiler keeps the addresses of all tokens
        }
        const Index strides[] = {0, x_stride, 2 * x_stride, 3 * x_stride};
        __m512 sums[TOKENS][PANELS] = {};
#pragma GCC unroll 2
        for (Index pair = 0; pair < num_pairs; ++pair) {
            __m512bh panels[PANELS];
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) {
                const uint16_t* here = weights + (p * num_pairs + pair) * 2 * PANEL;
                panels[p] = (__m512bh)_mm512_loadu_si512(here);
                if (token == 0) prefetch_panel(here, panel_bytes - (pair + 1) * 64, panel_bytes, PANELS);
            }
#pragma GCC unroll 16
            for (int t = 0; t < TOKENS; ++t) {
                int both;
                std::memcpy(&both, fours[t / 4] + strides[t % 4] + 2 * pair, sizeof both);
                const __m512bh pairs = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) sums[t][p] = _mm512_dpbf16_ps(sums[t][p], pairs, panels[p]);
            }
        }
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) finish<BFloat16>((Lanes)sums[t][p], part, token + t, (panel + p) * PANEL);
    }
};

#endif
