// Rotary positions, scaled sums, the best token.

#include "pointwise.h"

#include "cache_tiles.h"
#include "threads.h"

#include <cmath>
#include <type_traits>
#include <vector>

template <typename Number>
void add_scaled(const Number* x, float scale, Number* y, Index count) {
    parallel_ranges(count, count, [&](Index begin, Index end) {
        const Index whole = begin + (end - begin) / LANES * LANES;
        for (Index i = begin; i < whole; i += LANES)
            store_lanes(round_lanes<Number>(load_lanes(x + i) * scale) + load_lanes(y + i), y + i);
        for (Index i = whole; i < end; ++i)
            y[i] = from_float<Number>(to_float(from_float<Number>(to_float(x[i]) * scale)) + to_float(y[i]));
    });
}

// Heads of one token, [num_heads, dim], of which the first `turned` numbers are turned by its angles; cos and sin [turned],
// halves paired as in Llama.
template <typename Number>
static inline void rotate(const Number* from, Number* to, Index num_heads, Index dim, Index turned, const float* cos,
                          const float* sin) {
    const Index half = turned / 2, whole = half / LANES * LANES;
    for (Index head = 0; head < num_heads; ++head, from += dim, to += dim) {
        for (Index i = 0; i < whole; i += LANES) {
            const Lanes low = load_lanes(from + i), high = load_lanes(from + half + i);
            store_lanes(low * load_lanes(cos + i) - high * load_lanes(sin + i), to + i);
            store_lanes(high * load_lanes(cos + half + i) + low * load_lanes(sin + half + i), to + half + i);
        }
        for (Index i = whole; i < half; ++i) {
            const float low = to_float(from[i]), high = to_float(from[half + i]);
            to[i] = from_float<Number>(low * cos[i] - high * sin[i]);
            to[half + i] = from_float<Number>(high * cos[half + i] + low * sin[half + i]);
        }
        if (from != to) std::copy(from + turned, from + dim, to + turned);
    }
}

// Turns the keys of a token, and writes them and its values to their slot in tiles of the cache.
static inline void store_turned(const Heads& heads, Index token, const BFloat16* key, const BFloat16* value,
                                const float* cos, const float* sin) {
    static thread_local std::vector<BFloat16> turned;
    turned.resize(heads.num_kv_heads * heads.dim);
    rotate(key, turned.data(), heads.num_kv_heads, heads.dim, heads.turned, cos, sin);
    const CacheTiles tiles{static_cast<BFloat16*>(heads.keys), static_cast<BFloat16*>(heads.values), heads.num_kv_heads,
                           heads.dim, heads.dim};
    tiles.store(heads.slots[token], num_to_clear(heads.slots, heads.num_tokens, token), turned.data(), value);
}

constexpr Index TILE_STORE = 8;  // elements whose time it takes to store one in tiles, where a key's pairs are lines apart

// Turns queries and keys to their positions, and writes keys and values to their slots of the cache.
template <typename Number>
void rotate_and_store(const Heads& heads) {
    const Index width = heads.num_kv_heads * heads.dim;
    const auto one_token = [&](Index token) {
        const float *cos = heads.cos + token * heads.turned, *sin = heads.sin + token * heads.turned;
        Number* query = static_cast<Number*>(heads.query) + token * heads.num_heads * heads.dim;
        const Number* key = static_cast<const Number*>(heads.key) + token * width;
        const Number* value = static_cast<const Number*>(heads.value) + token * width;
        rotate(query, query, heads.num_heads, heads.dim, heads.turned, cos, sin);
        if constexpr (std::is_same_v<Number, BFloat16>)
            if (heads.is_tiled) return store_turned(heads, token, key, value, cos, sin);
        const Index slot = heads.slots[token] * width;
        rotate(key, static_cast<Number*>(heads.keys) + slot, heads.num_kv_heads, heads.dim, heads.turned, cos, sin);
        std::memcpy(static_cast<Number*>(heads.values) + slot, value, width * sizeof(Number));
    };
    const Index num_keys = heads.num_tokens * width * (heads.is_tiled ? TILE_STORE : 1);
    parallel_ranges(heads.num_tokens, heads.num_tokens * heads.num_heads * heads.dim + num_keys, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) one_token(token);
    });
}

// The first place of the largest number of a row; -1 if it is not finite or a number is none.
template <typename Number>
static inline Index argmax_of_row(const Number* row, Index width) {
    constexpr Index BLOCK = 1024;  // numbers, of which one block is searched for the place
    float largest = -INFINITY;
    int num_bad = 0;
    Index first = 0;
    for (Index begin = 0; begin < width; begin += BLOCK) {
        float here = -INFINITY;
#pragma omp simd reduction(max : here) reduction(+ : num_bad)
        for (Index i = begin; i < std::min(begin + BLOCK, width); ++i) {
            const float number = to_float(row[i]);
            here = number > here ? number : here;
            num_bad += number != number;
        }
        if (here > largest) largest = here, first = begin;
    }
    if (num_bad || !(std::abs(largest) < INFINITY)) return -1;
    while (to_float(row[first]) != largest) ++first;
    return first;
}

template <typename Number>
static void argmax(const Number* x, Index num_rows, Index width, Index* places) {
    parallel_ranges(num_rows, num_rows * width, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row) places[row] = argmax_of_row(x + row * width, width);
    });
}

template void add_scaled<float>(const float*, float, float*, Index);
template void add_scaled<BFloat16>(const BFloat16*, float, BFloat16*, Index);
template void add_scaled<Float16>(const Float16*, float, Float16*, Index);
template void rotate_and_store<float>(const Heads&);
template void rotate_and_store<BFloat16>(const Heads&);
template void rotate_and_store<Float16>(const Heads&);

extern "C" {
void argmax_f32(const float* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void argmax_bf16(const BFloat16* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void argmax_f16(const Float16* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void rotate_and_store_f32(const Heads* heads) { rotate_and_store<float>(*heads); }
void rotate_and_store_bf16(const Heads* heads) { rotate_and_store<BFloat16>(*heads); }
void rotate_and_store_f16(const Heads* heads) { rotate_and_store<Float16>(*heads); }
}
