// Attention of new tokens over the blocks of their requests in the paged cache, in one pass and without copying them.
//
//     o = sum_j p_j v_j,  p = softmax_j(scale q . k_j)     computed stretch by stretch with a running maximum and sum
//                                                          (online softmax, arXiv 1805.02867)
//
// A tile is 16 neighbouring slots, a stretch is 4 tiles, at the same positions for every token: so what a token gets does
// not depend on who is computed with it. Neighbouring tokens of a request go together, because they read the same tiles.
// In a cache of tiles the p_j are rounded to bfloat16, as the values are.

#include "attention.h"

#include "attention_pieces.h"
#include "attention_registers.h"
#include "attention_stretch.h"
#include "attention_tiles.h"
#include "attention_vectors.h"
#include "lines.h"
#include "threads.h"

#include <algorithm>
#include <type_traits>
#include <vector>

static inline Index tiles_per_block(const Attention& a) { return (a.block_size + TILE - 1) / TILE; }

// The tile that a position lies in, counted from the beginning of the context.
static inline Index tile_of(const Attention& a, Index position) {
    return position / a.block_size * tiles_per_block(a) + position % a.block_size / TILE;
}

// The tiles from `first` on, up to the one with the last of `length` positions.
static inline Stretch make_stretch(const Attention& a, Index token, Index first, Index length) {
    Stretch stretch{0, {}, {}, {}, false};
    const Index last = tile_of(a, length - 1);
    for (Index tile = first; tile <= last && stretch.num_tiles < STRETCH_TILES; ++tile) {
        const Index block = tile / tiles_per_block(a), in_block = tile % tiles_per_block(a) * TILE;
        const Index k = stretch.num_tiles++;
        stretch.positions[k] = block * a.block_size + in_block;
        stretch.slots[k] = a.blocks[a.block_starts[token] + block] * a.block_size + in_block;
        stretch.num_rows[k] = std::min(TILE, a.block_size - in_block);
    }
    stretch.is_whole = stretch.num_tiles == STRETCH_TILES && a.block_size % TILE == 0;
    return stretch;
}

// How a cache lies, and what multiplies what it holds.
template <typename Type>
struct PlainCache {
    using Number = Type;
    using Keys = PlainKeys<Type>;
    using Values = PlainValues<Type>;
    static constexpr bool IS_TILED = false;
};

#ifdef __AVX512BF16__
struct TiledCache {
    using Number = BFloat16;
    using Keys = TiledKeys;
    using Values = TiledValues;
    static constexpr bool IS_TILED = true;
};
#endif

// A key-value head's tiles of a stretch.
struct HeadTiles {
    const Stretch& stretch;
    Index kv_head;
};

// Where they lie in a cache of tiles.
static TilesAhead tiles_ahead(const void* cache, const HeadTiles& head, Index num_heads, Index dim) {
    TilesAhead ahead;
    for (Index k = 0; k < STRETCH_TILES; ++k) {
        const Index slot = head.stretch.slots[std::min(k, head.stretch.num_tiles - 1)];
        ahead.tiles[k] = reinterpret_cast<const char*>(
            tile_of_head(static_cast<const BFloat16*>(cache), slot, num_heads, head.kv_head, dim));
    }
    return ahead;
}

// Some queries over a stretch. One after the other in each part: within a query, each part waits for the one before.
template <int QUERIES, typename Number>
static inline void attend_stretch(const Attention& a, const Stretch& stretch, const PlainKeys<Number>& keys,
                                  const PlainValues<Number>& values, const Query<Number>* queries) {
    float scores[QUERIES][STRETCH_TILES * TILE], shrinks[QUERIES];
    const Number* numbers[QUERIES];
    float* sums[QUERIES];
    for (int q = 0; q < QUERIES; ++q) numbers[q] = queries[q].numbers, sums[q] = queries[q].head->sums;
    keys.template score<QUERIES>(numbers, stretch.num_tiles, scores);
    for (int q = 0; q < QUERIES; ++q) shrinks[q] = weigh(a, stretch, queries[q], scores[q]);
    values.template add<QUERIES>(scores, shrinks, stretch.num_tiles, sums);
}

// Sets the queries of a key-value head that attend to something in the stretch; returns how many there are.
template <typename Number>
static Index gather_queries(const Attention& a, const Item& item, Index kv_head, const Stretch& stretch,
                            const Number* numbers, Head* heads, Query<Number>* queries) {
    const Index group = a.num_heads / a.num_kv_heads, heads_per_token = (item.last_head - item.first_head) * group;
    const Index last = stretch.num_tiles - 1, stretch_end = stretch.positions[last] + stretch.num_rows[last];
    Index count = 0;
    for (Index t = 0; t < item.count; ++t) {
        const Index token = item.first + t, begin = first_position(a, token), end = a.lengths[token];
        if (begin >= stretch_end || end <= stretch.positions[0]) continue;
        const Index first_head = t * heads_per_token + (kv_head - item.first_head) * group;
        for (Index head = first_head; head < first_head + group; ++head)
            queries[count++] = {numbers + head * a.dim, begin, end, heads + head};
    }
    return count;
}

template <typename Cache>
struct Workspace {
    std::vector<Head> heads;
    Lines<float> sums;                      // [heads, value_dim]
    Lines<typename Cache::Number> numbers;  // of their queries, [heads, dim]
    std::vector<Query<typename Cache::Number>> queries;
    typename Cache::Keys keys;
    typename Cache::Values values;
    AttentionRegisters registers;
    AttentionVectors vectors;
};

// One stretch for one key-value head; `next` is asked for on the way.
template <typename Cache>
static void attend_head(const Attention& a, const Item& item, const HeadTiles& here, const HeadTiles& next,
                        Workspace<Cache>& space) {
    const auto& [stretch, kv_head] = here;
    const Index newest = a.lengths[item.first + item.count - 1];
    for (Index k = 0; k < stretch.num_tiles; ++k) {
        // Of the newest tile only the slots that are written: what lies behind them is nobody's.
        const Index num_rows = std::min(stretch.num_rows[k], newest - stretch.positions[k]);
        space.keys.set(k, a.keys, stretch.slots[k], a.num_kv_heads, kv_head, num_rows, a.dim);
        space.values.set(k, a.values, stretch.slots[k], a.num_kv_heads, kv_head, num_rows, a.value_dim);
    }
    const Index count = gather_queries(a, item, kv_head, stretch, space.numbers.data(), space.heads.data(),
                                       space.queries.data());
    const auto* queries = space.queries.data();
    if constexpr (Cache::IS_TILED) {
        const TilesAhead keys_ahead = tiles_ahead(a.keys, next, a.num_kv_heads, a.dim);
        const TilesAhead values_ahead = tiles_ahead(a.values, next, a.num_kv_heads, a.value_dim);
        const auto attend_with = [&](auto& products) {
            const Index most = products.MOST_QUERIES;
            for (Index q = 0; q < count; q += most)
                products.attend(a, stretch, space.keys, space.values, keys_ahead, values_ahead, queries + q,
                                std::min(most, count - q));
        };
        AttentionRegisters::take(a) ? attend_with(space.registers) : attend_with(space.vectors);
    } else {
        by_fours(count, [&](auto some, Index q) {
            attend_stretch<decltype(some)::value>(a, stretch, space.keys, space.values, queries + q);
        });
    }
}

template <typename Number>
static void write_outputs(const Attention& a, const Item& item, const std::vector<Head>& heads) {
    const Index group = a.num_heads / a.num_kv_heads, heads_per_token = (item.last_head - item.first_head) * group;
    for (Index t = 0; t < item.count; ++t) {
        const Index first_head = a.tokens[item.first + t] * a.num_heads + item.first_head * group;
        Number* output = static_cast<Number*>(a.output) + first_head * a.value_dim;
        for (Index h = 0; h < heads_per_token; ++h) {
            const Head& head = heads[t * heads_per_token + h];
#pragma omp simd
            for (Index i = 0; i < a.value_dim; ++i)
                output[h * a.value_dim + i] = from_float<Number>(head.sums[i] / head.total);
        }
    }
}

// The queries of an item's heads, one token behind the other.
template <typename Number>
static void copy_queries(const Attention& a, const Item& item, Lines<Number>& copied) {
    const Index group = a.num_heads / a.num_kv_heads, width = (item.last_head - item.first_head) * group * a.dim;
    Number* numbers = copied.make_room(item.count * width);
    for (Index t = 0; t < item.count; ++t) {
        const Index first_head = a.tokens[item.first + t] * a.num_heads + item.first_head * group;
        std::copy_n(static_cast<const Number*>(a.query) + first_head * a.dim, width, numbers + t * width);
    }
}

// The first stretch of an item's newest token.
static inline Stretch first_stretch(const Attention& a, const Item& item, Index* tile) {
    const Index newest = item.first + item.count - 1;
    *tile = tile_of(a, first_position(a, item.first)) / STRETCH_TILES * STRETCH_TILES;
    return make_stretch(a, newest, *tile, a.lengths[newest]);
}

// What head h of an item begins with: nothing, or its sink, of which a cache of tiles has powers of two.
template <typename Cache>
static Head first_head(const Attention& a, const Item& item, Index h, float* sums) {
    if (!a.sinks) return {-INFINITY, 0.0f, sums};
    const Index group = a.num_heads / a.num_kv_heads, heads_per_token = (item.last_head - item.first_head) * group;
    const float sink = a.sinks[item.first_head * group + h % heads_per_token];
    const float score = Cache::IS_TILED ? sink * 1.44269504f : sink;
    return {score, score == -INFINITY ? 0.0f : 1.0f, sums};
}

// Stretch by stretch, all heads of each: so the cache is read as it lies. `following` is the item behind, or null.
template <typename Cache>
static void attend_item(const Attention& a, const Item& item, const Item* following) {
    thread_local Workspace<Cache> space;
    const Index num_heads = item.count * (item.last_head - item.first_head) * (a.num_heads / a.num_kv_heads);
    float* sums = space.sums.make_room(num_heads * a.value_dim);
    std::fill_n(sums, num_heads * a.value_dim, 0.0f);
    space.heads.resize(num_heads);
    space.queries.resize(num_heads);
    for (Index h = 0; h < num_heads; ++h) space.heads[h] = first_head<Cache>(a, item, h, sums + h * a.value_dim);
    copy_queries(a, item, space.numbers);

    const Index newest = item.first + item.count - 1;
    Index tile, unused;
    for (Stretch stretch = first_stretch(a, item, &tile); stretch.num_tiles > 0;) {
        const Stretch next = make_stretch(a, newest, tile += STRETCH_TILES, a.lengths[newest]);
        const Stretch ahead = next.num_tiles > 0 || !following ? next : first_stretch(a, *following, &unused);
        for (Index kv_head = item.first_head; kv_head < item.last_head; ++kv_head) {
            const bool is_last = kv_head + 1 == item.last_head;
            const HeadTiles here{stretch, kv_head}, behind{stretch, kv_head + 1}, later{ahead, item.first_head};
            attend_head(a, item, here, !is_last ? behind : ahead.num_tiles > 0 ? later : here, space);
        }
        stretch = next;
    }
    space.registers.release();
    write_outputs<typename Cache::Number>(a, item, space.heads);
}

template <typename Cache>
static void attend_in(const Attention& a) {
    thread_local Pieces kept;
    Pieces& pieces = kept;
    share_out(a, pieces);
    const std::vector<Item>& items = pieces.items;
    parallel(pieces.count(), [&](Index piece) {
        const Index end = pieces.end(piece), count = items.size();
        for (Index item = pieces.starts[piece]; item < end; ++item)
            attend_item<Cache>(a, items[item], item + 1 < count ? &items[item + 1] : nullptr);
    });
}

template <>
void attend<float>(const Attention& a) {
    attend_in<PlainCache<float>>(a);
}

template <>
void attend<Float16>(const Attention& a) {
    attend_in<PlainCache<Float16>>(a);
}

template <>
void attend<BFloat16>(const Attention& a) {
#ifdef __AVX512BF16__
    if (a.is_tiled) return attend_in<TiledCache>(a);
#endif
    attend_in<PlainCache<BFloat16>>(a);
}

extern "C" {
void attend_f32(const Attention* attention) { attend<float>(*attention); }
void attend_bf16(const Attention* attention) { attend<BFloat16>(*attention); }
void attend_f16(const Attention* attention) { attend<Float16>(*attention); }

// The most positions, of a key-value head each, that one piece of work attends to from single tokens of their requests.
Index longest_attention_piece(const Attention* attention) {
    Pieces pieces;
    share_out(*attention, pieces);
    Index longest = 0;
    for (Index piece = 0; piece < pieces.count(); ++piece) {
        Index positions = 0;
        for (Index i = pieces.starts[piece]; i < pieces.end(piece); ++i) {
            const Item& item = pieces.items[i];
            positions += num_positions(*attention, item.first) * (item.last_head - item.first_head);
        }
        longest = std::max(longest, positions);
    }
    return longest;
}
}
