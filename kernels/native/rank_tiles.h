// Rank rows that meet tokens in the processor's tile registers. What tokens weigh them with is rounded to bfloat16, as
// PEFT's intermediate is in a model of that type.
#pragma once

#include "expand_tiles.h"
#include "shrink_tiles.h"

#ifdef HAS_TILE_REGISTERS

class RankTiles {
public:
    using Turned = ShrinkTiles::Turned;

    static bool takes(const Tokens& tokens) { return tokens.d_in % TILE_DEPTH == 0 && may_use_tiles(); }

    explicit RankTiles(const Tokens& tokens) : d_in_(tokens.d_in), tiles_(tokens) {}

    // Tokens as `shrink` takes them, until this thread turns others.
    Turned turn(Index token, Index num_tokens) const { return tiles_.turn(token, num_tokens); }

    template <typename Take>
    void shrink(const Turned& turned, const void* rows, const void* bias, Index num_tokens, Index row, Index num_rows,
                const Take& take) const {
        const auto* first_bias = bias ? static_cast<const BFloat16*>(bias) + row : nullptr;
        tiles_.shrink(turned, static_cast<const BFloat16*>(rows) + row * d_in_, first_bias, num_tokens, num_rows, take);
    }

    // In floats, for bfloat16 numbers [num_tokens, padded num_rows], zeros behind the rows.
    static Index weighted_size(const Segment& segment) { return segment.num_tokens * padded(segment.num_rows) / 2; }

    static void keep(const Segment& segment, Index token, Index row, Index count, const float* u, float* weighted) {
        const float* coefficients = segment.coefficients + token * segment.coefficient_stride + row;
        const __m512 c = _mm512_maskz_loadu_ps((1u << count) - 1, coefficients);
        const __mmask16 counts = _mm512_cmp_ps_mask(c, _mm512_setzero_ps(), _CMP_NEQ_UQ);
        const __m512 products = _mm512_maskz_mul_ps(counts, c, _mm512_loadu_ps(u));
        auto* place = reinterpret_cast<BFloat16*>(weighted) + token * padded(segment.num_rows) + row;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(place), (__m256i)_mm512_cvtneps_pbh(products));
    }

    static void expand(const LowRankPart& part, const Outputs& outputs, const Segment& segment, Index column, Index count,
                       const float* weighted) {
        const auto* weights = reinterpret_cast<const BFloat16*>(weighted);
        ExpandTiles(part, outputs, segment, weights, padded(segment.num_rows)).add(column, column + count);
    }

private:
    static Index padded(Index num_rows) { return (num_rows + ROW_BLOCK - 1) / ROW_BLOCK * ROW_BLOCK; }

    Index d_in_;
    ShrinkTiles tiles_;
};

#endif
