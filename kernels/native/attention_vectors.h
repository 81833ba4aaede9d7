// Attention to a stretch in vectors: a query's pair of dims meets those of 16 slots at once, and a pair of slots' weights 16
// dims. What a query gets does not depend on the others.
#pragma once

#include "attention_tiles.h"
#include "number_rows.h"
#include "query_softmax.h"

#ifdef __AVX512BF16__

class AttentionVectors {
public:
    static constexpr Index MOST_QUERIES = QUERIES_TOGETHER;

    // For `count` queries, MOST_QUERIES at most, whose numbers and sums lie in a row.
    void attend(const Attention& a, const Stretch& stretch, const TiledKeys& keys, const TiledValues& values,
                const TilesAhead& keys_ahead, const TilesAhead& values_ahead, const Query<BFloat16>* queries, Index count) {
        by_fours(count, [&](auto some, Index q) {
            score<decltype(some)::value>(keys, queries[q].numbers, stretch.num_tiles, q == 0 ? &keys_ahead : nullptr, q);
        });
        weigh_queries(a, stretch, queries, count, scores_, weights_, shrinks_);
        by_fours(count, [&](auto some, Index q) {
            add<decltype(some)::value>(values, stretch.num_tiles, q == 0 ? &values_ahead : nullptr, queries[q].head->sums, q);
        });
    }

private:
    static constexpr Index PAIRS = TILE / 2;  // of slots in a tile

    template <int QUERIES>
    void score(const TiledKeys& keys, const BFloat16* queries, Index num_tiles, const TilesAhead* ahead, Index first) {
        if (num_tiles == 4) return score_tiles<QUERIES, 4>(keys, queries, ahead, first);
        if (num_tiles == 3) return score_tiles<QUERIES, 3>(keys, queries, ahead, first);
        if (num_tiles == 2) return score_tiles<QUERIES, 2>(keys, queries, ahead, first);
        score_tiles<QUERIES, 1>(keys, queries, ahead, first);
    }

    // scores[q][slot] = q . k
    template <int QUERIES, int TILES>
    void score_tiles(const TiledKeys& keys, const BFloat16* queries, const TilesAhead* ahead, Index first) {
        __m512 sums[QUERIES][TILES] = {};
        for (Index pair = 0; pair < keys.dim / 2; ++pair) {
            __m512bh tiles[TILES];
#pragma GCC unroll 4
            for (int k = 0; k < TILES; ++k) tiles[k] = (__m512bh)_mm512_loadu_si512(keys.tiles[k] + pair * TILE * 2);
            if (ahead) ahead->prefetch(pair);
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q) {
                const __m512bh query = broadcast_pair(queries + q * keys.dim + 2 * pair);
#pragma GCC unroll 4
                for (int k = 0; k < TILES; ++k) sums[q][k] = _mm512_dpbf16_ps(sums[q][k], query, tiles[k]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int k = 0; k < TILES; ++k) _mm512_storeu_ps(scores_[first + q] + k * TILE, sums[q][k]);
    }

    // sums[q] = sums[q] shrinks[q] + sum over slots of weights[q][slot] v
    template <int QUERIES>
    void add(const TiledValues& values, Index num_tiles, const TilesAhead* ahead, float* sums, Index first) const {
        Index i = 0;
        for (; i + 4 * LANES <= values.dim; i += 4 * LANES) add_dims<QUERIES, 4>(values, num_tiles, ahead, sums, first, i);
        for (; i + LANES <= values.dim; i += LANES) add_dims<QUERIES, 1>(values, num_tiles, nullptr, sums, first, i);
        if (i < values.dim) add_dims<QUERIES, 1>(values, num_tiles, nullptr, sums, first, i);
    }

    // Of 16 dims at a time, or of the last ones.
    template <int QUERIES, int NUM_LANES>
    void add_dims(const TiledValues& values, Index num_tiles, const TilesAhead* ahead, float* sums, Index first, Index dim) const {
        const Index num_pairs = num_tiles * PAIRS, left = values.dim - dim;
        const __mmask16 there = left >= LANES ? 0xffff : (1u << left) - 1;
        __m512 totals[QUERIES][NUM_LANES];
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n)
                totals[q][n] = _mm512_mul_ps(_mm512_maskz_loadu_ps(there, sums + q * values.dim + dim + n * LANES),
                                             _mm512_set1_ps(shrinks_[first + q]));
        for (Index pair = 0; pair < num_pairs; ++pair) {
            const BFloat16* row = values.tiles[pair / PAIRS] + (pair % PAIRS * values.dim + dim) * 2;
            __m512bh numbers[NUM_LANES];
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n) numbers[n] = (__m512bh)load_row(row + n * 2 * LANES, 2 * (left - n * LANES));
            if (ahead) ahead->prefetch(dim / 2 + pair);
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q) {
                const __m512bh weight = broadcast_pair(weights_[first + q] + 2 * pair);
#pragma GCC unroll 4
                for (int n = 0; n < NUM_LANES; ++n) totals[q][n] = _mm512_dpbf16_ps(totals[q][n], weight, numbers[n]);
            }
        }
        for (Index pair = num_pairs; ahead && pair < STRETCH_TILES * PAIRS; ++pair) ahead->prefetch(dim / 2 + pair);
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n)
                _mm512_mask_storeu_ps(sums + q * values.dim + dim + n * LANES, there, totals[q][n]);
    }

    alignas(64) QueryScores scores_;
    alignas(64) QueryWeights weights_;
    alignas(64) float shrinks_[QUERIES_TOGETHER];
};

#else

class AttentionVectors {};

#endif
