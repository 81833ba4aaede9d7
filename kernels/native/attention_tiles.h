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

    // scores[q][slot] = q . k of the slots that there are.
    template <int QUERIES>
    void score(const Number* const* queries, Index num_tiles, float (*scores)[STRETCH_TILES * TILE]) const {
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

    // sums[q] = sums[q] * shrinks[q] + sum over slots of weights[q][slot] v
    template <int QUERIES>
    void add(const float (*weights)[STRETCH_TILES * TILE], const float* shrinks, Index num_tiles, float* const* sums) const {
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

struct TiledKeys : TiledHead {};
struct TiledValues : TiledHead {};

#endif
