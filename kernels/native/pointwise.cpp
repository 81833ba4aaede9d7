// What stands between the products of a decoder layer: norms, rotary positions, gated activations.

#include "pointwise.h"

#include "cache_tiles.h"
#include "threads.h"

#include <cmath>
#include <type_traits>
#include <vector>

template <typename Number>
static inline void norm_row(const Number* x, const Number* weight, Number* y, Index width, float epsilon) {
    const Index whole = width / LANES * LANES;
    Lanes squares = {};
    for (Index i = 0; i < whole; i += LANES) squares += load_lanes(x + i) * load_lanes(x + i);
    float total = sum_of(squares);
    for (Index i = whole; i < width; ++i) total += to_float(x[i]) * to_float(x[i]);
    const float scale = 1.0f / std::sqrt(total / width + epsilon);
    for (Index i = 0; i < whole; i += LANES)
        store_lanes(round_lanes<Number>(load_lanes(x + i) * scale) * load_lanes(weight + i), y + i);
    for (Index i = whole; i < width; ++i) {
        const Number normalized = from_float<Number>(to_float(x[i]) * scale);
        y[i] = from_float<Number>(to_float(normalized) * to_float(weight[i]));
    }
}

// y = x / sqrt(mean(x^2) + eps) * w, each of num_rows rows of `width`.
template <typename Number>
void rms_norm(const Number* x, const Number* weight, Number* y, Index num_rows, Index width, float epsilon) {
    parallel_ranges(num_rows, num_rows * width, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            norm_row(x + row * width, weight, y + row * width, width, epsilon);
    });
}

// y = silu(gate) * up, elementwise.
template <typename Number>
void silu_product(const Number* gate, const Number* up, Number* y, Index count) {
    parallel_ranges(count, count,
                    [&](Index begin, Index end) { gate_numbers(gate + begin, up + begin, y + begin, end - begin); });
}

// Heads of one token, [num_heads, dim], turned by its angles; cos and sin [dim], halves paired as in Llama.
template <typename Number>
static inline void rotate(const Number* from, Number* to, Index num_heads, Index dim, const Number* cos,
                          const Number* sin) {
    const Index half = dim / 2, whole = half / LANES * LANES;
    for (Index head = 0; head < num_heads; ++head, from += dim, to += dim) {
        for (Index i = 0; i < whole; i += LANES) {
            const Lanes low = load_lanes(from + i), high = load_lanes(from + half + i);
            store_lanes(low * load_lanes(cos + i) - high * load_lanes(sin + i), to + i);
            store_lanes(high * load_lanes(cos + half + i) + low * load_lanes(sin + half + i), to + half + i);
        }
        for (Index i = whole; i < half; ++i) {
            const float low = to_float(from[i]), high = to_float(from[half + i]);
            to[i] = from_float<Number>(low * to_float(cos[i]) - high * to_float(sin[i]));
            to[half + i] = from_float<Number>(high * to_float(cos[half + i]) + low * to_float(sin[half + i]));
        }
    }
}

// Turns the keys of a token, and writes them and its values to their slot in tiles of the cache.
static inline void store_turned(const Heads& heads, Index token, const BFloat16* key, const BFloat16* value,
                                const BFloat16* cos, const BFloat16* sin) {
    static thread_local std::vector<BFloat16> turned;
    turned.resize(heads.num_kv_heads * heads.dim);
    rotate(key, turned.data(), heads.num_kv_heads, heads.dim, cos, sin);
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
        const Number* cos = static_cast<const Number*>(heads.cos) + token * heads.dim;
        const Number* sin = static_cast<const Number*>(heads.sin) + token * heads.dim;
        Number* query = static_cast<Number*>(heads.query) + token * heads.num_heads * heads.dim;
        const Number* key = static_cast<const Number*>(heads.key) + token * width;
        const Number* value = static_cast<const Number*>(heads.value) + token * width;
        rotate(query, query, heads.num_heads, heads.dim, cos, sin);
        if constexpr (std::is_same_v<Number, BFloat16>)
            if (heads.is_tiled) return store_turned(heads, token, key, value, cos, sin);
        const Index slot = heads.slots[token] * width;
        rotate(key, static_cast<Number*>(heads.keys) + slot, heads.num_kv_heads, heads.dim, cos, sin);
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

template void rms_norm<float>(const float*, const float*, float*, Index, Index, float);
template void rms_norm<BFloat16>(const BFloat16*, const BFloat16*, BFloat16*, Index, Index, float);
template void silu_product<float>(const float*, const float*, float*, Index);
template void silu_product<BFloat16>(const BFloat16*, const BFloat16*, BFloat16*, Index);
template void rotate_and_store<float>(const Heads&);
template void rotate_and_store<BFloat16>(const Heads&);

extern "C" {
void argmax_f32(const float* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void argmax_bf16(const BFloat16* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void rms_norm_f32(const float* x, const float* w, float* y, Index rows, Index width, float eps) {
    rms_norm(x, w, y, rows, width, eps);
}
void rms_norm_bf16(const BFloat16* x, const BFloat16* w, BFloat16* y, Index rows, Index width, float eps) {
    rms_norm(x, w, y, rows, width, eps);
}
void silu_product_f32(const float* gate, const float* up, float* y, Index count) { silu_product(gate, up, y, count); }
void silu_product_bf16(const BFloat16* gate, const BFloat16* up, BFloat16* y, Index count) {
    silu_product(gate, up, y, count);
}
void rotate_and_store_f32(const Heads* heads) { rotate_and_store<float>(*heads); }
void rotate_and_store_bf16(const Heads* heads) { rotate_and_store<BFloat16>(*heads); }
}
