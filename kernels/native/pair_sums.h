// What rank rows add to outputs, w B, with the processor's pairwise product: to sums that are there already.
//
// A token meets its own rows, two at a time, in order.
#pragma once

#include "rank_sums.h"

#ifdef __AVX512BF16__

struct PairSums : RankSums {
    // sums [count][num_panels] += what tokens [first, + count) of the batch, all of one block of 16, add to panels from
    // `panel` on, three at most.
    void add(Index first, Index count, Index panel, Index num_panels, __m512* sums) const {
        if (num_panels == 3) return add_panels<3>(first, count, panel, sums);
        if (num_panels == 2) return add_panels<2>(first, count, panel, sums);
        add_panels<1>(first, count, panel, sums);
    }

private:
    template <int PANELS>
    void add_panels(Index first, Index count, Index panel, __m512* sums) const {
        const Index block = first / TOKENS_IN_BLOCK;
        if (!has_any(block)) return;
        for (Index i = items->first[block]; i < items->first[block + 1]; ++i) {
            const RankItem& item = items->items[i];
            const Index begin = std::max(first, item.token), end = std::min(first + count, item.token + item.num_tokens);
            if (begin < end) add_item<PANELS>(item, begin, end - begin, panel, sums + (begin - first) * PANELS);
        }
    }

    template <int PANELS>
    void add_item(const RankItem& item, Index token, Index count, Index panel, __m512* sums) const {
        const BFloat16* weights = weighted + item.weighted + token % TOKENS_IN_BLOCK * item.width;
        const auto some = [&](auto tokens) {
            constexpr int TOKENS = decltype(tokens)::value;
            for (; count >= TOKENS; count -= TOKENS, weights += TOKENS * item.width, sums += TOKENS * PANELS)
                add_tokens<TOKENS, PANELS>(item, weights, panel, sums);
        };
        some(std::integral_constant<int, 8>());
        some(std::integral_constant<int, 4>());
        some(std::integral_constant<int, 2>());
        some(std::integral_constant<int, 1>());
    }

    template <int TOKENS, int PANELS>
    void add_tokens(const RankItem& item, const BFloat16* weights, Index panel, __m512* sums) const {
        __m512 totals[TOKENS][PANELS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) totals[t][p] = sums[t * PANELS + p];
        for (Index first = 0; first < item.num_rows; first += EXPAND_ROWS) {
            const BFloat16* rows = pairs(item, first, panel);
            const Index size = panel_size(item, first), end = std::min(first + EXPAND_ROWS, item.num_rows);
            for (Index row = first; row < end; row += 2, rows += 2 * PANEL) {
                __m512bh panels[PANELS];
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) panels[p] = (__m512bh)_mm512_loadu_si512(rows + p * size);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t) {
                    const __m512bh weight = broadcast_pair(weights + t * item.width + row);
#pragma GCC unroll 3
                    for (int p = 0; p < PANELS; ++p) totals[t][p] = _mm512_dpbf16_ps(totals[t][p], weight, panels[p]);
                }
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) sums[t * PANELS + p] = totals[t][p];
    }
};

#endif
