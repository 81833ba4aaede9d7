// Attention to a stretch in the processor's tile registers, which take the cache's tiles as they lie and 16 queries at once.
// What a query gets does not depend on the others.
#pragma once

#include "attention_tiles.h"
#include "number_rows.h"
#include "query_softmax.h"
#include "tile_registers.h"

#ifdef HAS_TILE_REGISTERS

class AttentionRegisters {
public:
    static constexpr Index MOST_QUERIES = 4 * QUERIES_TOGETHER;

    // True for heads that fill registers.
    static bool take(const Attention& a) { return a.dim % HALF == 0 && a.value_dim % LANES == 0 && may_use_tiles(); }

    // What `attend_stretch` does, for `count` queries, MOST_QUERIES at most, whose numbers and sums lie in a row. Step by
    // step for all of them, so that one set's registers are at work while another's are waited for.
    void attend(const Attention& a, const Stretch& stretch, const TiledKeys& keys, const TiledValues& values,
                const TilesAhead& keys_ahead, const TilesAhead& values_ahead, const Query<BFloat16>* queries,
                Index count) {
        const auto for_sets = [&](const auto& step) {
            for (Index q = 0, set = 0; q < count; q += QUERIES_TOGETHER, ++set)
                step(q, std::min(QUERIES_TOGETHER, count - q), sets_[set]);
        };
        for_sets([&](Index q, Index num, Set& set) {
            shape(num);
            q == 0 ? score<true>(keys, queries[q].numbers, stretch.num_tiles, keys_ahead, set.scores)
                   : score<false>(keys, queries[q].numbers, stretch.num_tiles, keys_ahead, set.scores);
        });
        for_sets([&](Index q, Index num, Set& set) {
            weigh_queries(a, stretch, queries + q, num, set.scores, set.weights, set.shrinks);
        });
        for_sets([&](Index q, Index num, Set& set) {
            shape(num);
            float* sums = queries[q].head->sums;
            for (Index i = 0; i < num; ++i) shrink(sums + i * values.dim, values.dim, set.shrinks[i]);
            q == 0 ? add<true>(values, set.weights, stretch.num_tiles, values_ahead, sums)
                   : add<false>(values, set.weights, stretch.num_tiles, values_ahead, sums);
        });
    }

    // To be called when a piece of work ends.
    void release() {
        if (num_shaped_ > 0) release_tiles();
        num_shaped_ = 0;
    }

private:
    struct Set {
        alignas(64) QueryScores scores;
        alignas(64) QueryWeights weights;
        alignas(64) float shrinks[QUERIES_TOGETHER];
    };

    static constexpr Index PANELS = 4;                  // of 16 dims, that are summed at once
    static constexpr Index LINES = PANELS * LANES / 2;  // of 64 bytes that their values take in a tile

    // Registers: sums 0 to 3, queries 4, weights of a tile 5, keys 6, values of a tile 7.
    void shape(Index num_queries) {
        static const auto shapes = shapes_by_rows(TILE_ROWS, [](TileShapes& some, int count) {
            for (int tile : {0, 1, 2, 3, 4}) some.set(tile, count);
            some.set(5, count, TILE * sizeof(BFloat16));
            some.set(6, TILE_ROWS);
            some.set(7, TILE / 2);
        });
        if (num_queries != num_shaped_) shape_tiles(shapes[num_shaped_ = num_queries]);
    }

    // scores[q][slot] = q . k, for queries [count, dim].
    template <bool PREFETCH>
    static void score(const TiledKeys& keys, const BFloat16* queries, Index num_tiles, const TilesAhead& ahead,
                      QueryScores& scores) {
        clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
        for (Index i = 0; i < keys.dim; i += HALF) {
            load_tile<4>(queries + i, keys.dim * sizeof(BFloat16));
            score_tile<0, PREFETCH>(keys, i, num_tiles, ahead);
            score_tile<1, PREFETCH>(keys, i, num_tiles, ahead);
            score_tile<2, PREFETCH>(keys, i, num_tiles, ahead);
            score_tile<3, PREFETCH>(keys, i, num_tiles, ahead);
        }
        store_tile<0>(scores[0], sizeof scores[0]);
        store_tile<1>(scores[0] + TILE, sizeof scores[0]);
        store_tile<2>(scores[0] + 2 * TILE, sizeof scores[0]);
        store_tile<3>(scores[0] + 3 * TILE, sizeof scores[0]);
    }

    template <int K, bool PREFETCH>
    static void score_tile(const TiledKeys& keys, Index i, Index num_tiles, const TilesAhead& ahead) {
        for (Index turn = 0; PREFETCH && turn < 4; ++turn) ahead.prefetch(i / 2 + 4 * K + turn);
        if (K >= num_tiles) return;
        load_tile<6>(keys.tiles[K] + i * TILE, 2 * TILE * sizeof(BFloat16));
        add_pair_products<K, 4, 6>();
    }

    static void shrink(float* sums, Index width, float factor) {
        if (factor == 1.0f) return;
        for (Index i = 0; i < width; i += LANES) store_lanes(load_lanes(sums + i) * factor, sums + i);
    }

    // sums[q] += sum over slots of weights[q][slot] v, for sums [count, dim].
    template <bool PREFETCH>
    static void add(const TiledValues& values, const QueryWeights& weights, Index num_tiles, const TilesAhead& ahead,
                    float* sums) {
        const Index stride = values.dim * sizeof(float);
        for (Index first = 0; first < values.dim; first += PANELS * LANES) {
            const Index width = std::min(PANELS * LANES, values.dim - first);
            for_panels(width, [&](auto p) { load_tile<p.value>(sums + first + p.value * LANES, stride); });
            for (Index k = 0; k < num_tiles; ++k) {
                load_tile<5>(weights[0] + k * TILE, sizeof weights[0]);
                const BFloat16* tile = values.tiles[k] + 2 * first;
                for_panels(width, [&](auto p) {
                    load_tile<7>(tile + p.value * 2 * LANES, 2 * values.dim * sizeof(BFloat16));
                    add_pair_products<p.value, 5, 7>();
                });
                for (Index line = k * LINES / num_tiles; PREFETCH && line < (k + 1) * LINES / num_tiles; ++line)
                    ahead.prefetch(first / 2 + line);
            }
            for_panels(width, [&](auto p) { store_tile<p.value>(sums + first + p.value * LANES, stride); });
        }
    }

    // Of the panels that `width` sums take, each in a register.
    template <typename Work>
    static void for_panels(Index width, const Work& work) {
        work(std::integral_constant<int, 0>());
        if (width > LANES) work(std::integral_constant<int, 1>());
        if (width > 2 * LANES) work(std::integral_constant<int, 2>());
        if (width > 3 * LANES) work(std::integral_constant<int, 3>());
    }

    Index num_shaped_ = 0;  // queries
    Set sets_[MOST_QUERIES / QUERIES_TOGETHER];
};

#else

class AttentionRegisters {
public:
    static constexpr Index MOST_QUERIES = 1;

    static bool take(const Attention&) { return false; }

    template <typename... Arguments>
    void attend(const Arguments&...) {}

    void release() {}
};

#endif
