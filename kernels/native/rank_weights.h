// What tokens weigh rank rows with, c (A x + a), rounded to bfloat16, as PEFT's intermediate is in a model of that type.
#pragma once

#include "rank_rows.h"
#include "rank_sums.h"

#include <vector>

#ifdef __AVX512BF16__

class RankWeights {
public:
    static constexpr Index BLOCK_TOKENS = TOKENS_IN_BLOCK;

    // In floats, for bfloat16 numbers [blocks of 16 tokens of the batch, 16, padded num_rows].
    static Index weighted_size(const Segment& segment) {
        return num_blocks(segment) * BLOCK_TOKENS * padded(segment.num_rows) / 2;
    }

    // By block of 16 tokens; the calling thread keeps them until it makes others.
    static const RankItems* items(const Additions& additions) {
        static thread_local std::vector<RankItem> items;
        static thread_local std::vector<Index> first;
        static thread_local RankItems all;
        const auto of_each_block = [&](const auto& take) {
            Index weighted = 0;
            for (const Segment* s = additions.segments; s < additions.segments + additions.num_segments; ++s) {
                const Index width = padded(s->num_rows);
                const Index first = s->token_start / BLOCK_TOKENS, last = s->token_start + s->num_tokens;
                for (Index block = first; block < first + num_blocks(*s); ++block, weighted += BLOCK_TOKENS * width) {
                    const Index token = std::max(s->token_start, block * BLOCK_TOKENS);
                    const Index end = std::min(last, (block + 1) * BLOCK_TOKENS);
                    take(block, RankItem{weighted, width, s->row_start, s->num_rows, s->extent, token, end - token});
                }
            }
        };
        first.assign(1, 0);
        of_each_block([&](Index block, const RankItem&) {
            if (block + 2 > static_cast<Index>(first.size())) first.resize(block + 2, 0);
            ++first[block + 1];
        });
        for (size_t block = 1; block < first.size(); ++block) first[block] += first[block - 1];
        items.resize(first.back());
        static thread_local std::vector<Index> next;
        next = first;
        of_each_block([&](Index block, const RankItem& item) { items[next[block]++] = item; });
        all = {items.data(), first.data(), static_cast<Index>(first.size()) - 1};
        return &all;
    }

    // Keeps c u of a token, counted from the segment's first, for `count` rows, and zeros behind them, 16 in all: exactly 0
    // where c is 0, whatever u is.
    static void keep(const Segment& segment, Index token, Index row, Index count, const float* u, float* weighted) {
        const float* coefficients = segment.coefficients + token * segment.coefficient_stride + row;
        const __m512 c = _mm512_maskz_loadu_ps((1u << count) - 1, coefficients);
        const __mmask16 counts = _mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512 products = _mm512_maskz_mul_ps(counts, c, _mm512_loadu_ps(u));
        BFloat16* here = place(segment, segment.token_start + token, row, weighted);
        _mm256_store_si256(reinterpret_cast<__m256i*>(here), (__m256i)_mm512_cvtneps_pbh(products));
    }

protected:
    static ShrinkRows rows_of(const Segment& s, const LowRankPart& part) {
        return {part.shrink_rows, part.shrink_bias, s.row_start, s.extent};
    }

    // The block of a resident's rows that begins with `row`.
    static RowBlock row_block(const ShrinkRows& all, Index row, Index d_in) {
        const auto* bias = static_cast<const BFloat16*>(all.bias);
        return {static_cast<const BFloat16*>(all.rows) + (all.start + row) * d_in,
                rows_in_block(all.extent, row, SHRINK_ROWS), bias ? bias + all.start + row : nullptr};
    }

    static Index padded(Index num_rows) { return (num_rows + EXPAND_ROWS - 1) / EXPAND_ROWS * EXPAND_ROWS; }

    static Index num_blocks(const Segment& segment) {
        return (segment.token_start % BLOCK_TOKENS + segment.num_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    }

    // What token `token` of the batch weighs a row with.
    static BFloat16* place(const Segment& segment, Index token, Index row, float* weighted) {
        const Index first = segment.token_start / BLOCK_TOKENS * BLOCK_TOKENS;
        return reinterpret_cast<BFloat16*>(weighted) + (token - first) * padded(segment.num_rows) + row;
    }
};

#endif
