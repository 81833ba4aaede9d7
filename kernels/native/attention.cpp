// Attention of new tokens over the blocks of their requests in the paged cache, in one pass and without copying them.
//
//     o = sum_j p_j v_j,  p = softmax_j(scale q . k_j)     computed block by block with a running maximum and sum
//                                                          (online softmax, arXiv 1805.02867)

#include "attention.h"

#include "dot.h"
#include "lanes.h"
#include "threads.h"

#include <algorithm>
#include <vector>

constexpr Index MAX_DIM = 256;
constexpr Index TILE = 16;       // neighbouring slots that are scored together
constexpr Index WIDE = 4;        // lanes of a head whose sums stay in registers

// The running state of one query head.
struct Head {
    float maximum, total;
    float sums[MAX_DIM];
};

// weights[i] = exp(score_i - maximum) of `count` slots, 0 behind them; returns how much the sums so far shrink.
template <typename Number>
static inline float weigh_slots(const Attention& a, const Number* query, const Number* keys, Index count, Head& head,
                                float* weights) {
    const Index stride = a.num_kv_heads * a.dim;
    float scores[TILE];
    Index slot = 0;
    if (count == TILE) {
        dot_rows<TILE>(query, keys, stride, a.dim, scores);
        slot = TILE;
    }
    for (; slot < count; ++slot) dot_rows<1>(query, keys + slot * stride, stride, a.dim, scores + slot);
    for (; slot < TILE; ++slot) scores[slot] = -INFINITY;
    float maximum = head.maximum, total = 0;
    if (a.softcap > 0)
        for (Index i = 0; i < count; ++i) scores[i] = a.softcap / a.scale * std::tanh(scores[i] * a.scale / a.softcap);
#pragma omp simd reduction(max : maximum)
    for (Index i = 0; i < TILE; ++i) {
        scores[i] *= a.scale;
        maximum = scores[i] > maximum ? scores[i] : maximum;
    }
#pragma omp simd reduction(+ : total)
    for (Index i = 0; i < TILE; ++i) {
        weights[i] = fast_exp(scores[i] - maximum);
        total += weights[i];
    }
    const float shrink = fast_exp(head.maximum - maximum);
    head.maximum = maximum;
    head.total = head.total * shrink + total;
    return shrink;
}

// What a tile adds to a head: the weights of its slots, and how much the sums so far shrink.
struct TileWeights {
    float weights[TILE];
    float shrink;
};

// sums = sums * shrink + sum_i weights[i] values[i], for lanes of several heads that read the same values.
template <int HEADS, int NUM_LANES, typename Number>
static inline void add_values(const Number* values, Index stride, const TileWeights* tiles, Index count, Index first,
                              Head* heads) {
    Lanes totals[HEADS][NUM_LANES];
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < NUM_LANES; ++i)
            totals[h][i] = load_lanes(heads[h].sums + first + i * LANES) * tiles[h].shrink;
    for (Index slot = 0; slot < count; ++slot) {
        Lanes value[NUM_LANES];
#pragma GCC unroll 4
        for (int i = 0; i < NUM_LANES; ++i) value[i] = load_lanes(values + slot * stride + first + i * LANES);
#pragma GCC unroll 4
        for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
            for (int i = 0; i < NUM_LANES; ++i) totals[h][i] += value[i] * tiles[h].weights[slot];
    }
#pragma GCC unroll 4
    for (int h = 0; h < HEADS; ++h)
#pragma GCC unroll 4
        for (int i = 0; i < NUM_LANES; ++i) store_lanes(totals[h][i], heads[h].sums + first + i * LANES);
}

template <int HEADS, typename Number>
static inline void attend_tile(const Attention& a, const Number* query, const Number* keys, const Number* values,
                               Index count, Head* heads) {
    TileWeights tiles[HEADS];
    for (int h = 0; h < HEADS; ++h)
        tiles[h].shrink = weigh_slots(a, query + h * a.dim, keys, count, heads[h], tiles[h].weights);
    const Index stride = a.num_kv_heads * a.value_dim;
    Index i = 0;
    for (; i + WIDE * LANES <= a.value_dim; i += WIDE * LANES)
        add_values<HEADS, WIDE>(values, stride, tiles, count, i, heads);
    for (; i + LANES <= a.value_dim; i += LANES) add_values<HEADS, 1>(values, stride, tiles, count, i, heads);
    for (; i < a.value_dim; ++i)
        for (int h = 0; h < HEADS; ++h) {
            heads[h].sums[i] *= tiles[h].shrink;
            for (Index slot = 0; slot < count; ++slot)
                heads[h].sums[i] += tiles[h].weights[slot] * to_float(values[slot * stride + i]);
        }
}

// Neighbouring slots of one request, all in one block.
struct TilePlace {
    Index slot, count;
};

static inline TilePlace place_of(const Attention& a, Index query, Index position) {
    const Index in_block = position % a.block_size;
    const Index block = a.blocks[a.block_starts[query] + position / a.block_size];
    return {block * a.block_size + in_block, std::min({TILE, a.block_size - in_block, a.lengths[query] - position})};
}

template <typename Number>
static inline const Number* rows_of(const void* cache, Index slot, const Attention& a, Index kv_head, Index dim) {
    return static_cast<const Number*>(cache) + (slot * a.num_kv_heads + kv_head) * dim;
}

// One number from each line of `count` neighbouring numbers, so that the lines come into the cache.
template <typename Number>
static inline void touch(const Number* numbers, Index count) {
    constexpr Index LINE = 64 / sizeof(Number);
    for (Index i = 0; i < count; i += LINE) asm volatile("" : : "r"(*reinterpret_cast<const char*>(numbers + i)));
}

// Reads a tile before its turn, in one sweep over all heads. Plain loads in a row: the processor runs ahead of those,
// and is a third faster than with as many prefetch instructions.
template <typename Number>
static inline void touch_tile(const Attention& a, Index query, Index position) {
    if (position >= a.lengths[query]) return;
    const TilePlace place = place_of(a, query, position);
    touch(rows_of<Number>(a.keys, place.slot, a, 0, a.dim), place.count * a.num_kv_heads * a.dim);
    touch(rows_of<Number>(a.values, place.slot, a, 0, a.value_dim), place.count * a.num_kv_heads * a.value_dim);
}

static void begin(Head* heads, Index group, Index value_dim) {
    for (Index h = 0; h < group; ++h) {
        heads[h].maximum = -INFINITY;
        heads[h].total = 0;
        std::fill(heads[h].sums, heads[h].sums + value_dim, 0.0f);
    }
}

// The query heads that share a key-value head, over one tile.
template <typename Number>
static inline void attend_heads(const Attention& a, Index query, Index kv_head, TilePlace place, Head* heads) {
    const Index group = a.num_heads / a.num_kv_heads;
    const Number* heads_of_token =
        static_cast<const Number*>(a.query) + (a.tokens[query] * a.num_heads + kv_head * group) * a.dim;
    const Number* keys = rows_of<Number>(a.keys, place.slot, a, kv_head, a.dim);
    const Number* values = rows_of<Number>(a.values, place.slot, a, kv_head, a.value_dim);
    Index h = 0;
    for (; h + 4 <= group; h += 4) attend_tile<4>(a, heads_of_token + h * a.dim, keys, values, place.count, heads + h);
    for (; h + 2 <= group; h += 2) attend_tile<2>(a, heads_of_token + h * a.dim, keys, values, place.count, heads + h);
    for (; h < group; ++h) attend_tile<1>(a, heads_of_token + h * a.dim, keys, values, place.count, heads + h);
}

// Key-value heads [first, last) of one token. Tile by tile, all heads of each: so the cache is read as it lies.
template <typename Number>
static void attend_token(const Attention& a, Index query, Index first, Index last, Head* heads) {
    const Index group = a.num_heads / a.num_kv_heads, length = a.lengths[query], count = (last - first) * group;
    begin(heads, count, a.value_dim);
    Index position = a.window > 0 && length > a.window ? length - a.window : 0;
    while (position < length) {
        const TilePlace place = place_of(a, query, position);
        position += place.count;
        if (a.is_cold && last - first == a.num_kv_heads) touch_tile<Number>(a, query, position);
        for (Index kv_head = first; kv_head < last; ++kv_head) {
            attend_heads<Number>(a, query, kv_head, place, heads + (kv_head - first) * group);
        }
    }
    Number* output =
        static_cast<Number*>(a.output) + (a.tokens[query] * a.num_heads + first * group) * a.value_dim;
    for (Index h = 0; h < count; ++h)
#pragma omp simd
        for (Index i = 0; i < a.value_dim; ++i)
            output[h * a.value_dim + i] = from_float<Number>(heads[h].sums[i] / heads[h].total);
}

// A token is one piece of work, unless there are too few of them for the threads: then each key-value head is one.
template <typename Number>
void attend(const Attention& a) {
    const Index heads_per_item = a.num_tokens >= 4 * num_threads() ? a.num_kv_heads : 1;
    const Index items_per_token = a.num_kv_heads / heads_per_item;
    parallel(a.num_tokens * items_per_token, [&](Index item) {
        thread_local std::vector<Head> heads;
        heads.resize(heads_per_item * (a.num_heads / a.num_kv_heads));
        const Index first = item % items_per_token * heads_per_item;
        attend_token<Number>(a, item / items_per_token, first, first + heads_per_item, heads.data());
    });
}

template void attend<float>(const Attention&);
template void attend<BFloat16>(const Attention&);

extern "C" {
void attend_f32(const Attention* attention) { attend<float>(*attention); }
void attend_bf16(const Attention* attention) { attend<BFloat16>(*attention); }
}
