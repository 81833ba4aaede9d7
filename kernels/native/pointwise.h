// What stands between the products of a decoder layer.
#pragma once

#include "lanes.h"

#include <algorithm>

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
    const auto some = [](const Number* gate, const Number* up, Number* y) {
        const Lanes g = load_lanes(gate);
        store_lanes(round_lanes<Number>(g / (1.0f + exp_for<Number>(-g))) * load_lanes(up), y);
    };
    Index i = 0;
    for (; i + LANES <= count; i += LANES) some(gate + i, up + i, y + i);
    if (i == count) return;
    Number last_gate[LANES] = {}, last_up[LANES] = {}, last_y[LANES];
    std::copy(gate + i, gate + count, last_gate);
    std::copy(up + i, up + count, last_up);
    some(last_gate, last_up, last_y);
    std::copy_n(last_y, count - i, y + i);
}

template <typename Number>
void silu_product(const Number* gate, const Number* up, Number* y, Index count);

template <typename Number>
void rotate_and_store(const Heads& heads);
