// Rank rows that meet tokens with the processor's pairwise product, 16 rows or 16 outputs at a time.
#pragma once

#include "pair_sums.h"
#include "rank_weights.h"

#ifdef __AVX512BF16__

class RankPairs : public RankWeights {
public:
    explicit RankPairs(const Tokens& tokens) : tokens_(tokens) {}

    static constexpr Index ROW_BLOCKS_TOGETHER = 1;

    // take(token, row, count, u): A x + a of a token with a block of the rank rows, both counted from the first.
    template <typename Take>
    void shrink(const ShrinkRows& all, const Rectangle& some, const Take& take) const {
        Index row = 0;
        for (; row + SHRINK_ROWS < some.num_rows; row += 2 * SHRINK_ROWS) shrink_panels<2, 4>(all, some, row, take);
        if (row < some.num_rows) shrink_panels<1, 8>(all, some, row, take);
    }

    // Writes c u of a piece, which is of one segment, and exactly 0 where c is 0, whatever u is.
    void weigh(const RankPiece& piece, const LowRankPart& part, float* weighted) const {
        const Segment& s = *piece.segment;
        const Rectangle& some = piece.some;
        shrink(rows_of(s, part), some, [&](Index token, Index row, Index count, const float* u) {
            keep(s, some.token - s.token_start + token, some.row + row, count, u, weighted);
        });
    }

    // Before tokens of a segment are kept one by one.
    static void clear(const Segment&, float*) {}

    // Adds a block, whose first token is the batch's, to the part's outputs.
    static void expand(const WeighedRows& all, const WeighedPart& part, const Outputs& outputs, const Block& block) {
        const PairSums sums{RankSums::of({&all, &part})};
        const Index end = block.column + block.num_columns;
        Index column = block.column;
        for (; column + 3 * PANEL <= end; column += 3 * PANEL) add_columns<3>(sums, outputs, block, column, 3 * PANEL);
        for (; column < end; column += PANEL) add_columns<1>(sums, outputs, block, column, std::min(PANEL, end - column));
    }

private:
    static constexpr Index TOKENS = 8;
    static constexpr Index PREFETCH_BYTES = 4096;

    // Of up to PANELS blocks of rows that begin with `row`, MOST tokens at a time.
    template <int PANELS, int MOST, typename Take>
    void shrink_panels(const ShrinkRows& all, const Rectangle& some, Index row, const Take& take) const {
        RowBlock panels[PANELS];
        for (int p = 0; p < PANELS; ++p) panels[p] = row_block(all, some.row + row + p * SHRINK_ROWS, tokens_.d_in);
        Index token = 0;
        const auto by_tokens = [&](auto tokens) {
            constexpr int TOKENS = decltype(tokens)::value;
            if constexpr (TOKENS <= MOST)
                for (; token + TOKENS <= some.num_tokens; token += TOKENS) {
                    alignas(64) float u[TOKENS][PANELS][SHRINK_ROWS];
                    multiply<TOKENS, PANELS>(panels, some.token + token, token == 0, u);
                    for (int t = 0; t < TOKENS; ++t)
                        for (int p = 0; p < PANELS; ++p) {
                            const Index first = row + p * SHRINK_ROWS;
                            take(token + t, first, std::min(SHRINK_ROWS, some.num_rows - first), u[t][p]);
                        }
                }
        };
        by_tokens(std::integral_constant<int, 8>());
        by_tokens(std::integral_constant<int, 4>());
        by_tokens(std::integral_constant<int, 2>());
        by_tokens(std::integral_constant<int, 1>());
    }

    // u = A x + a of some tokens. The even pairs of inputs and the odd ones are summed apart, because one sum would wait for
    // itself where tokens are few.
    template <int COUNT, int PANELS>
    void multiply(const RowBlock* panels, Index token, bool is_first, float (*u)[PANELS][SHRINK_ROWS]) const {
        const BFloat16* x = static_cast<const BFloat16*>(tokens_.x) + token * tokens_.x_stride;
        const Index num_pairs = tokens_.d_in / 2;
        __m512 even[COUNT][PANELS] = {}, odd[COUNT][PANELS] = {};
        const auto add = [&](Index pair, __m512 (*sums)[PANELS]) {
            __m512bh rows[PANELS];
#pragma GCC unroll 2
            for (int p = 0; p < PANELS; ++p) {
                const BFloat16* here = panels[p].rows + pair * 2 * panels[p].width;
                rows[p] = (__m512bh)_mm512_loadu_si512(here);
                if (is_first) __builtin_prefetch(reinterpret_cast<const char*>(here) + PREFETCH_BYTES);
            }
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t) {
                const __m512bh inputs = broadcast_pair(x + t * tokens_.x_stride + 2 * pair);
#pragma GCC unroll 2
                for (int p = 0; p < PANELS; ++p) sums[t][p] = _mm512_dpbf16_ps(sums[t][p], inputs, rows[p]);
            }
        };
        Index pair = 0;
        for (; pair + 2 <= num_pairs; pair += 2) add(pair, even), add(pair + 1, odd);
        if (pair < num_pairs) add(pair, even);
#pragma GCC unroll 2
        for (int p = 0; p < PANELS; ++p) {
            const auto& [rows, width, bias] = panels[p];
            const Lanes offsets = bias ? (Lanes)widen(_mm256_maskz_loadu_epi16((1u << width) - 1, bias)) : Lanes{};
#pragma GCC unroll 8
            for (int t = 0; t < COUNT; ++t) store_lanes((Lanes)even[t][p] + (Lanes)odd[t][p] + offsets, u[t][p]);
        }
    }

    template <int PANELS>
    static void add_columns(const PairSums& sums, const Outputs& outputs, const Block& block, Index column, Index count) {
        for (Index token = block.token; token < block.token + block.num_tokens; token += TOKENS) {
            const Index num_tokens = std::min(TOKENS, block.token + block.num_tokens - token);
            if (!sums.has_any(token / BLOCK_TOKENS)) continue;
            __m512 added[TOKENS * PANELS] = {};
            sums.add(token, num_tokens, column / PANEL, PANELS, added);
            BFloat16* y = outputs.at<BFloat16>(token - block.token, column);
            for (Index t = 0; t < num_tokens; ++t, y += outputs.stride)
                for (int p = 0; p < PANELS; ++p) {
                    const __mmask16 there = (1u << std::min(count - p * PANEL, PANEL)) - 1;
                    const Lanes total = widen(_mm256_maskz_loadu_epi16(there, y + p * PANEL)) + (Lanes)added[t * PANELS + p];
                    _mm256_mask_storeu_epi16(y + p * PANEL, there, (__m256i)_mm512_cvtneps_pbh((__m512)total));
                }
        }
    }

    const Tokens& tokens_;
};

#endif
