// What stands between the products of a decoder layer.
#pragma once

#include "number.h"

struct Heads {
    void* query;        // [num_tokens, num_heads * dim], turned in place
    const void* key;    // [num_tokens, num_kv_heads * dim]
    const void* value;  // [num_tokens, num_kv_heads * dim]
    const void* cos;    // [num_tokens, dim]
    const void* sin;    // [num_tokens, dim]
    void* keys;         // the cache, [num_slots, num_kv_heads, dim] or tiles
    void* values;
    const Index* slots;  // [num_tokens]
    Index num_tokens, num_heads, num_kv_heads, dim;
    Index is_tiled;  // the cache, see cache_tiles.h
};

template <typename Number>
void rms_norm(const Number* x, const Number* weight, Number* y, Index num_rows, Index width, float epsilon);

// y = silu(gate) * up, elementwise, of neighbours.
template <typename Number>
static inline void gate_numbers(const Number* gate, const Number* up, Number* y, Index count) {
#pragma omp simd
    for (Index i = 0; i < count; ++i) {
        const float g = to_float(gate[i]);
        const Number activated = from_float<Number>(g / (1.0f + fast_exp(-g)));
        y[i] = from_float<Number>(to_float(activated) * to_float(up[i]));
    }
}

template <typename Number>
void silu_product(const Number* gate, const Number* up, Number* y, Index count);

template <typename Number>
void rotate_and_store(const Heads& heads);
