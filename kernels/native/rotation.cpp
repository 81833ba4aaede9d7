// Rotary positions, on the way of keys and values to the cache.

#include "rotation.h"

#include "cache_tiles.h"
#include "lanes.h"
#include "threads.h"

#include <type_traits>
#include <vector>

// The first `turned` numbers of a head, in halves; cos and sin [turned].
template <typename Number>
static inline void turn_halves(const Number* from, Number* to, Index turned, const float* cos, const float* sin) {
    const Index half = turned / 2, whole = half / LANES * LANES;
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
}

// The same, of which neighbours are pairs.
template <typename Number>
static inline void turn_neighbours(const Number* from, Number* to, Index turned, const float* cos, const float* sin) {
    const Index half = turned / 2;
    for (Index i = 0; i < half; ++i) {
        const float even = to_float(from[2 * i]), odd = to_float(from[2 * i + 1]);
        to[2 * i] = from_float<Number>(even * cos[i] - odd * sin[i]);
        to[2 * i + 1] = from_float<Number>(odd * cos[half + i] + even * sin[half + i]);
    }
}

// So many heads of one token, [count, dim], turned by its angles.
template <typename Number>
static inline void rotate(const Heads& heads, const Number* from, Number* to, Index count, const float* cos, const float* sin) {
    const Index turned = heads.turned;
    for (Index head = 0; head < count; ++head, from += heads.dim, to += heads.dim) {
        heads.by_neighbours ? turn_neighbours(from, to, turned, cos, sin) : turn_halves(from, to, turned, cos, sin);
        if (from != to) std::copy(from + turned, from + heads.dim, to + turned);
    }
}

// Turns the keys of a token, and writes them and its values to their slot in tiles of the cache.
static inline void store_turned(const Heads& heads, Index token, const BFloat16* key, const BFloat16* value,
                                const float* cos, const float* sin) {
    static thread_local std::vector<BFloat16> turned;
    turned.resize(heads.num_kv_heads * heads.dim);
    rotate(heads, key, turned.data(), heads.num_kv_heads, cos, sin);
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
        rotate(heads, query, query, heads.num_heads, cos, sin);
        if constexpr (std::is_same_v<Number, BFloat16>)
            if (heads.is_tiled) return store_turned(heads, token, key, value, cos, sin);
        const Index slot = heads.slots[token] * width;
        rotate(heads, key, static_cast<Number*>(heads.keys) + slot, heads.num_kv_heads, cos, sin);
        std::memcpy(static_cast<Number*>(heads.values) + slot, value, width * sizeof(Number));
    };
    const Index num_keys = heads.num_tokens * width * (heads.is_tiled ? TILE_STORE : 1);
    parallel_ranges(heads.num_tokens, heads.num_tokens * heads.num_heads * heads.dim + num_keys, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) one_token(token);
    });
}

template void rotate_and_store<float>(const Heads&);
template void rotate_and_store<BFloat16>(const Heads&);
template void rotate_and_store<Float16>(const Heads&);

extern "C" {
void rotate_and_store_f32(const Heads* heads) { rotate_and_store<float>(*heads); }
void rotate_and_store_bf16(const Heads* heads) { rotate_and_store<BFloat16>(*heads); }
void rotate_and_store_f16(const Heads* heads) { rotate_and_store<Float16>(*heads); }
}
