// Keys and values of a stretch's tiles, as queries are multiplied with them.
#pragma once

#include "cache_tiles.h"
#include "dot.h"
#include "lanes.h"
#include "number_rows.h"

#include <algorithm>

constexpr Index STRETCH_TILES = 4;  // that are weighed together

// The tiles that come next, asked for while this stretch's are multiplied, a line of each tile at a time.
struct TilesAhead {
    const char* tiles[STRETCH_TILES];

    void prefetch(Index line) const {
#pragma GCC unroll 4
        for (const char* tile : tiles) __builtin_prefetch(tile + line * 64);
    }
};

// Slots one behind the other: where the rows of the tiles lie.
template <typename Number>
struct PlainTiles {
    const Number* rows[STRETCH_TILES];
    Index stride, dim, num_rows[STRETCH_TILES];

    // Tile k of a head; of its slots `count` are there.
    void set(Index k, const void* cache, Index slot, Index num_heads, Index head, Index count, Index width) {
        rows[k] = static_cast<const Number*>(cache) + (slot * num_heads + head) * width;
        num_rows[k] = count, stride = num_heads * width, dim = width;
    }
};

template <typename Number>
struct PlainKeys : PlainTiles<Number> {
    using PlainTiles<Number>::rows, PlainTiles<Number>::stride, PlainTiles<Number>::dim, PlainTiles<Number>::num_rows;

    // scores[q][slot] = q . k of the slots that there are.
    template <int QUERIES>
    void score(const Number* const* queries, Index num_tiles, const TilesAhead&,
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
struct PlainValues : PlainTiles<Number> {
    using PlainTiles<Number>::rows, PlainTiles<Number>::stride, PlainTiles<Number>::dim, PlainTiles<Number>::num_rows;

    // To what `add` multiplies with.
    static void round(float*) {}

    // sums[q] = sums[q] * shrinks[q] + sum over slots of weights[q][slot] v
    template <int QUERIES>
    void add(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles,
             const TilesAhead&, float* const* sums) const {
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

// Where the tiles of a head lie in a cache of tiles.
struct TiledHead {
    const BFloat16* tiles[STRETCH_TILES];
    Index dim;

    void set(Index k, const void* cache, Index slot, Index num_heads, Index head, Index, Index width) {
        tiles[k] = tile_of_head(static_cast<const BFloat16*>(cache), slot, num_heads, head, width);
        dim = width;
    }
};

// A query's pair of dims meets those of 16 slots at once.
struct TiledKeys : TiledHead {
    template <int QUERIES>
    void score(const BFloat16* const* queries, Index num_tiles, const TilesAhead& ahead,
               float (*scores)[STRETCH_TILES * TILE]) const {
        if (num_tiles == 4) return score_tiles<QUERIES, 4>(queries, ahead, scores);
        if (num_tiles == 3) return score_tiles<QUERIES, 3>(queries, ahead, scores);
        if (num_tiles == 2) return score_tiles<QUERIES, 2>(queries, ahead, scores);
        score_tiles<QUERIES, 1>(queries, ahead, scores);
    }

    template <int QUERIES, int TILES>
    void score_tiles(const BFloat16* const* queries, const TilesAhead& ahead,
                     float (*scores)[STRETCH_TILES * TILE]) const {
        __m512 sums[QUERIES][TILES] = {};
        for (Index pair = 0; pair < dim / 2; ++pair) {
            __m512bh keys[TILES];
#pragma GCC unroll 4
            for (int k = 0; k < TILES; ++k) keys[k] = (__m512bh)_mm512_loadu_si512(tiles[k] + pair * TILE * 2);
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

// A pair of slots' weights meets 16 dims at once.
struct TiledValues : TiledHead {
    static constexpr Index PAIRS = TILE / 2;

    static void round(float* weights) {
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(weights));
        _mm512_storeu_ps(weights, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
    }

    template <int QUERIES>
    void add(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles,
             const TilesAhead& ahead, float* const* sums) const {
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
                   const TilesAhead& ahead, float* const* sums, Index first) const {
        __m512 totals[QUERIES][NUM_LANES];
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n)
                totals[q][n] = _mm512_mul_ps(_mm512_loadu_ps(sums[q] + first + n * LANES), _mm512_set1_ps(shrinks[q]));
        for (Index pair = 0; pair < num_tiles * PAIRS; ++pair) {
            __m512bh values[NUM_LANES];
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n) values[n] = (__m512bh)load_values(pair, first + n * LANES);
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

    // A pair of slots' values of 16 dims, zeros behind the last one.
    __m512i load_values(Index pair, Index first) const {
        return load_row(tiles[pair / PAIRS] + (pair % PAIRS * dim + first) * 2, 2 * (dim - first));
    }

    // The last dims, fewer than 16.
    template <int QUERIES>
    void add_rest(const int32_t (*both)[STRETCH_TILES * PAIRS], const float* shrinks, Index num_tiles,
                  const TilesAhead& ahead, float* const* sums, Index first) const {
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
