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
            for (Index row = 0; begin < end && row < item.num_rows; row += EXPAND_ROWS)
                add_rows<PANELS>(item, row, begin, end - begin, panel, sums + (begin - first) * PANELS);
        }
    }

    template <int PANELS>
    void add_rows(const RankItem& item, Index row, Index token, Index count, Index panel, __m512* sums) const {
        const BFloat16* weights = weighted + item.weighted + token % TOKENS_IN_BLOCK * item.width + row;
        const Rows rows{pairs(item, row, panel), panel_size(item, row), (std::min(EXPAND_ROWS, item.num_rows - row) + 1) / 2};
        const auto some = [&](auto tokens) {
            constexpr int TOKENS = decltype(tokens)::value;
            for (; count >= TOKENS; count -= TOKENS, weights += TOKENS * item.width, sums += TOKENS * PANELS)
                add_tokens<TOKENS, PANELS>(rows, weights, item.width, sums);
        };
        some(std::integral_constant<int, 8>());
        some(std::integral_constant<int, 4>());
        some(std::integral_constant<int, 2>());
        some(std::integral_constant<int, 1>());
    }

    // Pairs of rank rows, a panel's [num_pairs][16][2], the panels so many numbers apart.
    struct Rows {
        const BFloat16* pairs;
        Index panel_size, num_pairs;
    };

    template <int TOKENS, int PANELS>
    static void add_tokens(const Rows& rows, const BFloat16* weights, Index width, __m512* sums) {
        __m512 totals[TOKENS][PANELS];
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) totals[t][p] = sums[t * PANELS + p];
        for (Index pair = 0; pair < rows.num_pairs; ++pair) {
            __m512bh panels[PANELS];
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p)
                panels[p] = (__m512bh)_mm512_loadu_si512(rows.pairs + p * rows.panel_size + pair * 2 * PANEL);
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                const __m512bh weight = broadcast_pair(weights + t * width + 2 * pair);
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) totals[t][p] = _mm512_dpbf16_ps(totals[t][p], weight, panels[p]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) sums[t * PANELS + p] = totals[t][p];
    }
};

#endif
