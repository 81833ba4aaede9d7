// Keys and values of a stretch's tiles, as queries are multiplied with them.
#pragma once

#include "dot.h"
#include "lanes.h"
#include "words.h"

#include <algorithm>

constexpr Index MAX_DIM = 256;
constexpr Index TILE = 16;       // neighbouring slots
constexpr Index STRETCH_TILES = 4;  // that are weighed together

// The rows of the tiles that come next, asked for while this stretch's are multiplied, a line of each tile at a time.
struct RowsAhead {
    const char* rows[STRETCH_TILES];
    Index stride, lines_per_row;   // in bytes; 64 bytes each

    void prefetch(Index turn) const {
        const Index offset = turn / lines_per_row * stride + turn % lines_per_row * 64;
#pragma GCC unroll 4
        for (const char* tile : rows) __builtin_prefetch(tile + offset);
    }
};

// Where the rows of the tiles lie: all that there is to know where they are multiplied as they are.
template <typename Number>
struct PlainTiles {
    const Number* rows[STRETCH_TILES];
    Index stride, dim, num_rows[STRETCH_TILES];

    void load(Index k, const Number* first, Index row_stride, Index count, Index width) {
        rows[k] = first, num_rows[k] = count, stride = row_stride, dim = width;
    }
};

template <typename Number>
struct KeyTiles : PlainTiles<Number> {
    using PlainTiles<Number>::rows, PlainTiles<Number>::stride, PlainTiles<Number>::dim, PlainTiles<Number>::num_rows;

    // scores[q][slot] = q . k of the slots that there are.
    template <int QUERIES>
    void score(const Number* const* queries, Index num_tiles, const RowsAhead&,
               float (*scores)[STRETCH_TILES * TILE]) const {
        for (int q = 0; q < QUERIES; ++q)
            for (Index k = 0; k < num_tiles; ++k)
                for (Index slot = 0; slot < TILE; ++slot) {
                    float* score = &scores[q][k * TILE + slot];
                    *score = 0;
                    if (slot < num_rows[k]) dot_rows<1>(queries[q], rows[k] + slot * stride, stride, dim, score);
                }
    }
};

template <typename Number>
struct ValueTiles : PlainTiles<Number> {
    using PlainTiles<Number>::rows, PlainTiles<Number>::stride, PlainTiles<Number>::dim, PlainTiles<Number>::num_rows;

    // To what `add` multiplies with.
    static void round(float*) {}

    // sums[q] = sums[q] * shrinks[q] + sum over slots of weights[q][slot] v
    template <int QUERIES>
    void add(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles,
             const RowsAhead&, float* const* sums) const {
        for (int q = 0; q < QUERIES; ++q) {
            Index i = 0;
            for (; i + 4 * LANES <= dim; i += 4 * LANES) add_lanes<4>(weights[q], shrinks[q], num_tiles, sums[q], i);
            for (; i + LANES <= dim; i += LANES) add_lanes<1>(weights[q], shrinks[q], num_tiles, sums[q], i);
            for (; i < dim; ++i) {
                sums[q][i] *= shrinks[q];
                for (Index k = 0; k < num_tiles; ++k)
                    for (Index slot = 0; slot < num_rows[k]; ++slot)
                        sums[q][i] += weights[q][k * TILE + slot] * to_float(rows[k][slot * stride + i]);
            }
        }
    }

    template <int NUM_LANES>
    void add_lanes(const float* weights, float shrink, Index num_tiles, float* sums, Index first) const {
        Lanes totals[NUM_LANES];
#pragma GCC unroll 4
        for (int n = 0; n < NUM_LANES; ++n) totals[n] = load_lanes(sums + first + n * LANES) * shrink;
        for (Index k = 0; k < num_tiles; ++k)
            for (Index slot = 0; slot < num_rows[k]; ++slot) {
                const Number* row = rows[k] + slot * stride + first;
#pragma GCC unroll 4
                for (int n = 0; n < NUM_LANES; ++n) totals[n] += load_lanes(row + n * LANES) * weights[k * TILE + slot];
            }
#pragma GCC unroll 4
        for (int n = 0; n < NUM_LANES; ++n) store_lanes(totals[n], sums + first + n * LANES);
    }
};

#ifdef __AVX512BF16__

// Pairs of dims of 16 slots side by side, so that a query's pair meets them all at once.
template <>
struct KeyTiles<BFloat16> {
    __m512i pairs[STRETCH_TILES][MAX_DIM / 2];
    Index dim;

    // Slots behind num_rows become zeros.
    void load(Index k, const BFloat16* first, Index stride, Index num_rows, Index width) {
        dim = width;
        for (Index i = 0; i < width; i += HALF) {
            __m512i rows[TILE];
#pragma GCC unroll 16
            for (Index r = 0; r < TILE; ++r)
                rows[r] = r < num_rows ? load_row(first + r * stride + i, width - i) : _mm512_setzero_si512();
            transpose(rows);
#pragma GCC unroll 16
            for (Index r = 0; r < TILE; ++r) pairs[k][i / 2 + r] = rows[r];
        }
    }

    template <int QUERIES>
    void score(const BFloat16* const* queries, Index num_tiles, const RowsAhead& ahead,
               float (*scores)[STRETCH_TILES * TILE]) const {
        if (num_tiles == 4) return score_tiles<QUERIES, 4>(queries, ahead, scores);
        if (num_tiles == 3) return score_tiles<QUERIES, 3>(queries, ahead, scores);
        if (num_tiles == 2) return score_tiles<QUERIES, 2>(queries, ahead, scores);
        score_tiles<QUERIES, 1>(queries, ahead, scores);
    }

    template <int QUERIES, int TILES>
    void score_tiles(const BFloat16* const* queries, const RowsAhead& ahead,
                     float (*scores)[STRETCH_TILES * TILE]) const {
        __m512 sums[QUERIES][TILES] = {};
        for (Index pair = 0; pair < dim / 2; ++pair) {
            __m512bh keys[TILES];
#pragma GCC unroll 4
            for (int k = 0; k < TILES; ++k) keys[k] = (__m512bh)pairs[k][pair];
            ahead.prefetch(pair);
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q) {
                int both;
                std::memcpy(&both, queries[q] + 2 * pair, sizeof both);
                const __m512bh query = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
                for (int k = 0; k < TILES; ++k) sums[q][k] = _mm512_dpbf16_ps(sums[q][k], query, keys[k]);
            }
        }
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int k = 0; k < TILES; ++k) _mm512_storeu_ps(scores[q] + k * TILE, sums[q][k]);
    }
};

// Pairs of slots of 16 dims side by side, so that a pair of weights meets them all at once.
template <>
struct ValueTiles<BFloat16> {
    static constexpr Index PAIRS = TILE / 2;
    __m512i pairs[MAX_DIM / LANES][STRETCH_TILES * PAIRS];
    Index dim;

    // Slots behind num_rows become zeros.
    void load(Index k, const BFloat16* first, Index stride, Index num_rows, Index width) {
        dim = width;
        for (Index i = 0; i < width; i += HALF)
            for (Index pair = 0; pair < PAIRS; ++pair) {
                const auto row = [&](Index slot) {
                    return load_row(first + slot * stride + i, slot < num_rows ? width - i : 0);
                };
                interleave(row(2 * pair), row(2 * pair + 1), &pairs[i / LANES][k * PAIRS + pair],
                           &pairs[i / LANES + 1][k * PAIRS + pair]);
            }
    }

    static void round(float* weights) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights));
        _mm512_storeu_ps(weights, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    }

    template <int QUERIES>
    void add(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles,
             const RowsAhead& ahead, float* const* sums) const {
        int32_t both[QUERIES][STRETCH_TILES * PAIRS];  // pairs of weights
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
            for (Index k = 0; k < num_tiles; ++k)
                _mm256_storeu_si256(reinterpret_cast<__m256i*>(both[q] + k * PAIRS),
                                    (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights[q] + k * TILE)));
        Index i = 0;
        for (; i + 4 * LANES <= dim; i += 4 * LANES) add_lanes<QUERIES, 4>(both, shrinks, num_tiles, ahead, sums, i);
        for (; i + LANES <= dim; i += LANES) add_lanes<QUERIES, 1>(both, shrinks, num_tiles, ahead, sums, i);
        if (i < dim) add_rest<QUERIES>(both, shrinks, num_tiles, ahead, sums, i);
    }

    template <int QUERIES, int NUM_LANES>
    void add_lanes(const int32_t (*both)[STRETCH_TILES * PAIRS], const float* shrinks, Index num_tiles,
                   const RowsAhead& ahead, float* const* sums, Index first) const {
        __m512 totals[QUERIES][NUM_LANES];
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n)
                totals[q][n] = _mm512_mul_ps(_mm512_loadu_ps(sums[q] + first + n * LANES), _mm512_set1_ps(shrinks[q]));
        for (Index pair = 0; pair < num_tiles * PAIRS; ++pair) {
            __m512bh values[NUM_LANES];
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n) values[n] = (__m512bh)pairs[first / LANES + n][pair];
            if constexpr (NUM_LANES == 4) ahead.prefetch(first / 2 + pair);
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q) {
                const __m512bh weight = (__m512bh)_mm512_set1_epi32(both[q][pair]);
#pragma GCC unroll 4
                for (int n = 0; n < NUM_LANES; ++n) totals[q][n] = _mm512_dpbf16_ps(totals[q][n], weight, values[n]);
            }
        }
        if constexpr (NUM_LANES == 4)
            for (Index pair = num_tiles * PAIRS; pair < STRETCH_TILES * PAIRS; ++pair) ahead.prefetch(first / 2 + pair);
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n) _mm512_storeu_ps(sums[q] + first + n * LANES, totals[q][n]);
    }

    // The last dims, fewer than 16.
    template <int QUERIES>
    void add_rest(const int32_t (*both)[STRETCH_TILES * PAIRS], const float* shrinks, Index num_tiles,
                  const RowsAhead& ahead, float* const* sums, Index first) const {
        float rest[QUERIES][LANES] = {}, *places[QUERIES];
        for (int q = 0; q < QUERIES; ++q) {
            std::copy(sums[q] + first, sums[q] + dim, rest[q]);
            places[q] = rest[q] - first;
        }
        add_lanes<QUERIES, 1>(both, shrinks, num_tiles, ahead, places, first);
        for (int q = 0; q < QUERIES; ++q) std::copy(rest[q], rest[q] + dim - first, sums[q] + first);
    }
};

#endif
