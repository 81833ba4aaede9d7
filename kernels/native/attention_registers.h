// Attention of up to 16 queries to a stretch in the processor's tile registers: the tiles of keys and values lie as these take
// them. What a query gets does not depend on the others.
#pragma once

#include "attention_stretch.h"
#include "attention_tiles.h"
#include "tile_registers.h"

constexpr Index QUERIES_TOGETHER = 16;

#ifdef HAS_TILE_REGISTERS

static inline bool have_attention_registers() { return may_use_tiles(); }

constexpr Index SLOTS = STRETCH_TILES * TILE;  // of a stretch

// scores[q][slot] = q . k; `queries` [QUERIES_TOGETHER][MAX_DIM], zeros behind the keys' dims.
static inline void score_in_registers(const KeyTiles<BFloat16>& keys, const BFloat16* queries, Index num_tiles,
                                      const RowsAhead& ahead, float (*scores)[SLOTS]) {
    constexpr Index STRIDE = sizeof scores[0];
    clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
    for (Index i = 0; i < keys.dim; i += HALF) {
        load_tile<4>(queries + i, MAX_DIM * sizeof(BFloat16));
        const auto add_tile = [&](auto k, auto place) {
            constexpr int K = decltype(k)::value, PLACE = decltype(place)::value;
            for (Index turn = 0; turn < 4; ++turn) ahead.prefetch(i / 2 + 4 * K + turn);
            if (K >= num_tiles) return;
            load_tile<PLACE>(&keys.pairs[K][i / 2], sizeof keys.pairs[0][0]);
            add_pair_products<K, 4, PLACE>();
        };
        add_tile(std::integral_constant<int, 0>(), std::integral_constant<int, 6>());
        add_tile(std::integral_constant<int, 1>(), std::integral_constant<int, 7>());
        add_tile(std::integral_constant<int, 2>(), std::integral_constant<int, 6>());
        add_tile(std::integral_constant<int, 3>(), std::integral_constant<int, 7>());
    }
    store_tile<0>(scores[0], STRIDE);
    store_tile<1>(scores[0] + TILE, STRIDE);
    store_tile<2>(scores[0] + 2 * TILE, STRIDE);
    store_tile<3>(scores[0] + 3 * TILE, STRIDE);
}

// sums[q] = sums[q] * shrinks[q] + sum over slots of weights[q][slot] v
static inline void add_in_registers(const ValueTiles<BFloat16>& values, const BFloat16 (*weights)[SLOTS],
                                    const float* shrinks, Index num_tiles, const RowsAhead& ahead,
                                    const Query<BFloat16>* queries, Index count) {
    constexpr Index PAIRS = TILE_ROWS, PANELS = 4;
    for (Index first = 0; first < values.dim; first += PANELS * LANES) {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        const Index num_panels = std::min(PANELS, (values.dim - first + LANES - 1) / LANES);
        for (Index pair = 0; pair < STRETCH_TILES * TILE / 2; pair += PAIRS) {
            const auto add_panel = [&](auto p, auto place) {
                constexpr int P = decltype(p)::value, PLACE = decltype(place)::value;
                for (Index turn = 0; turn < 4; ++turn) ahead.prefetch(first / 2 + pair + 4 * P + turn);
                if (P >= num_panels || 2 * pair >= num_tiles * TILE) return;
                load_tile<PLACE>(&values.pairs[first / LANES + P][pair], sizeof values.pairs[0][0]);
                add_pair_products<P, 4, PLACE>();
            };
            load_tile<4>(weights[0] + 2 * pair, sizeof weights[0]);
            add_panel(std::integral_constant<int, 0>(), std::integral_constant<int, 6>());
            add_panel(std::integral_constant<int, 1>(), std::integral_constant<int, 7>());
            add_panel(std::integral_constant<int, 2>(), std::integral_constant<int, 6>());
            add_panel(std::integral_constant<int, 3>(), std::integral_constant<int, 7>());
        }
        alignas(64) float sums[QUERIES_TOGETHER][PANELS * LANES];
        store_tile<0>(sums[0], sizeof sums[0]);
        store_tile<1>(sums[0] + LANES, sizeof sums[0]);
        store_tile<2>(sums[0] + 2 * LANES, sizeof sums[0]);
        store_tile<3>(sums[0] + 3 * LANES, sizeof sums[0]);
        for (Index q = 0; q < count; ++q) {
            float* all = queries[q].head->sums + first;
            const Index width = std::min(PANELS * LANES, values.dim - first);
#pragma omp simd
            for (Index i = 0; i < width; ++i) all[i] = all[i] * shrinks[q] + sums[q][i];
        }
    }
}

// What `attend_stretch` does, for `count` queries.
static inline void attend_in_registers(const Attention& a, const Stretch& stretch, const KeyTiles<BFloat16>& keys,
                                       const ValueTiles<BFloat16>& values, const RowsAhead& keys_ahead,
                                       const RowsAhead& values_ahead, const Query<BFloat16>* queries, Index count) {
    alignas(64) BFloat16 numbers[QUERIES_TOGETHER][MAX_DIM], weights[QUERIES_TOGETHER][SLOTS];
    alignas(64) float scores[QUERIES_TOGETHER][SLOTS];
    float shrinks[QUERIES_TOGETHER];
    for (Index q = 0; q < count; ++q)
        for (Index i = 0; i < a.dim; i += HALF)
            _mm512_store_si512(&numbers[q][i], load_row(queries[q].numbers + i, a.dim - i));
    shape_for_rows(count);  // queries or weights are the rows, keys and values the tiles 6 and 7
    score_in_registers(keys, numbers[0], stretch.num_tiles, keys_ahead, scores);
    for (Index q = 0; q < count; ++q) {
        shrinks[q] = weigh(a, stretch, queries[q], scores[q]);
        for (Index k = 0; k < STRETCH_TILES; ++k) {
            const Lanes tile = k < stretch.num_tiles ? load_lanes(scores[q] + k * TILE) : Lanes{};
            store_lanes(tile, weights[q] + k * TILE);
        }
    }
    add_in_registers(values, weights, shrinks, stretch.num_tiles, values_ahead, queries, count);
    release_tiles();
}

#else

static inline bool have_attention_registers() { return false; }

static inline void attend_in_registers(const Attention&, const Stretch&, const KeyTiles<BFloat16>&,
                                       const ValueTiles<BFloat16>&, const RowsAhead&, const RowsAhead&,
                                       const Query<BFloat16>*, Index) {}

#endif
