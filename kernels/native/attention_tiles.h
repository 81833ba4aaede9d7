// Keys and values of a stretch's tiles, as queries are multiplied with them.
#pragma once

#include "cache_tiles.h"
#include "dot.h"
#include "lanes.h"

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

    // scores[q][slot] = q . k of the slots that there are; of the others anything.
    template <int QUERIES>
    void score(const Number* const* queries, Index num_tiles, float (*scores)[STRETCH_TILES * TILE]) const {
        constexpr int SLOTS = TOGETHER / (QUERIES == 3 ? 4 : QUERIES);
        for (Index k = 0; k < num_tiles; ++k)
            if constexpr (HAS_MANY_REGISTERS)
                for (Index slot = 0; slot < num_rows[k]; slot += SLOTS) score_slots<QUERIES, SLOTS>(queries, k, slot, scores);
            else
                for (int q = 0; q < QUERIES; ++q)
                    for (Index slot = 0; slot < num_rows[k]; ++slot)
                        dot_rows<1>(queries[q], rows[k] + slot * stride, stride, dim, &scores[q][k * TILE + slot]);
    }

private:
    static constexpr int TOGETHER = LANES;  // products

    // Each product is summed in the same order, whichever are computed with it.
    template <int QUERIES, int SLOTS>
    void score_slots(const Number* const* queries, Index k, Index slot, float (*scores)[STRETCH_TILES * TILE]) const {
        const Number* keys[SLOTS];
        for (int s = 0; s < SLOTS; ++s) keys[s] = rows[k] + std::min(slot + s, num_rows[k] - 1) * stride;
        Lanes totals[TOGETHER] = {};
        Index i = 0;
        for (; i + LANES <= dim; i += LANES) {
            Lanes inputs[QUERIES];
#pragma GCC unroll 4
            for (int q = 0; q < QUERIES; ++q) inputs[q] = load_lanes(queries[q] + i);
#pragma GCC unroll 16
            for (int s = 0; s < SLOTS; ++s) {
                const Lanes key = load_lanes(keys[s] + i);
#pragma GCC unroll 4
                for (int q = 0; q < QUERIES; ++q) totals[q * SLOTS + s] += inputs[q] * key;
            }
        }
        const Lanes sums = sum_each(totals);
        for (int q = 0; q < QUERIES; ++q)
            for (int s = 0; s < SLOTS; ++s) {
                float sum = sums[q * SLOTS + s];
                for (Index rest = i; rest < dim; ++rest) sum += to_float(queries[q][rest]) * to_float(keys[s][rest]);
                scores[q][k * TILE + slot + s] = sum;
            }
    }
};

template <typename Number>
struct PlainValues : PlainTiles<Number> {
    using PlainTiles<Number>::rows, PlainTiles<Number>::stride, PlainTiles<Number>::dim, PlainTiles<Number>::num_rows;

    // sums[q] = sums[q] * shrinks[q] + sum over slots of weights[q][slot] v
    template <int QUERIES>
    void add(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles, float* const* sums) const {
        constexpr int TOGETHER = HAS_MANY_REGISTERS ? QUERIES : 1;
        for (int q = 0; q < QUERIES; q += TOGETHER) add_some<TOGETHER>(weights + q, shrinks + q, num_tiles, sums + q);
    }

private:
    static constexpr int MOST_LANES = 4;

    template <int QUERIES>
    void add_some(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles,
                  float* const* sums) const {
        Index i = 0;
        for (; i + MOST_LANES * LANES <= dim; i += MOST_LANES * LANES)
            add_lanes<QUERIES, MOST_LANES>(weights, shrinks, num_tiles, sums, i);
        for (; i + LANES <= dim; i += LANES) add_lanes<QUERIES, 1>(weights, shrinks, num_tiles, sums, i);
        for (; i < dim; ++i)
            for (int q = 0; q < QUERIES; ++q) {
                sums[q][i] *= shrinks[q];
                for (Index k = 0; k < num_tiles; ++k)
                    for (Index slot = 0; slot < num_rows[k]; ++slot)
                        sums[q][i] += weights[q][k * TILE + slot] * to_float(rows[k][slot * stride + i]);
            }
    }

    template <int QUERIES, int NUM_LANES>
    void add_lanes(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles, float* const* sums,
                   Index first) const {
        Lanes totals[QUERIES][NUM_LANES];
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n) totals[q][n] = load_lanes(sums[q] + first + n * LANES) * shrinks[q];
        for (Index k = 0; k < num_tiles; ++k)
            for (Index slot = 0; slot < num_rows[k]; ++slot) {
                const Number* row = rows[k] + slot * stride + first;
#pragma GCC unroll 4
                for (int n = 0; n < NUM_LANES; ++n) {
                    const Lanes values = load_lanes(row + n * LANES);
#pragma GCC unroll 4
                    for (int q = 0; q < QUERIES; ++q) totals[q][n] += values * weights[q][k * TILE + slot];
                }
            }
#pragma GCC unroll 4
        for (int q = 0; q < QUERIES; ++q)
#pragma GCC unroll 4
            for (int n = 0; n < NUM_LANES; ++n) store_lanes(totals[q][n], sums[q] + first + n * LANES);
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

struct TiledKeys : TiledHead {};
struct TiledValues : TiledHead {};

#endif
