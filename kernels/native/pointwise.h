// What stands between the products of a decoder layer.
#pragma once

#include "lanes.h"

#include <algorithm>

struct Heads {
    void* query;        // [num_tokens, num_heads * dim], turned in place
    const void* key;    // [num_tokens, num_kv_heads * dim]
    const void* value;  // [num_tokens, num_kv_heads * dim]
    const float* cos;   // [num_tokens, turned]
    const float* sin;   // [num_tokens, turned]
    void* keys;         // the cache, [num_slots, num_kv_heads, dim] or tiles
    void* values;
    const Index* slots;  // [num_tokens]
    Index num_tokens, num_heads, num_kv_heads, dim;
    Index turned;    // numbers of a head that are turned, the first ones
    Index is_tiled;  // the cache, see cache_tiles.h
};

// An RMSNorm of rows of `width`. Weights of the numbers' own type multiply what is rounded already, as in Llama; wide ones,
// which are float32, multiply before anything is rounded, as in Gemma.
struct Norm {
    const void* weight;  // null: there is no such norm
    Index width, is_wide;
    float epsilon;
};

// y = x / sqrt(mean(x^2) + eps) * w, or y += that, for `count` numbers.
template <typename Number>
void rms_norm(const Number* x, const Norm& norm, Number* y, Index count, bool add);

// y += x * scale, elementwise; both are rounded.
template <typename Number>
void add_scaled(const Number* x, float scale, Number* y, Index count);

enum Activation : Index { SILU, GELU_TANH };

// x sigmoid(x)
struct Silu {
    template <typename Number>
    static Lanes of(Lanes x) {
        return x / (1.0f + exp_for<Number>(-x));
    }
};

// x (1 + tanh(z)) / 2 with z = sqrt(2 / pi) (x + 0.044715 x^3), which is x sigmoid(2 z).
struct GeluTanh {
    template <typename Number>
    static Lanes of(Lanes x) {
        constexpr float TWO_ROOTS = 1.5957691216f;
        return x / (1.0f + exp_for<Number>(-TWO_ROOTS * (x + 0.044715f * x * x * x)));
    }
};

template <typename Function, typename Number>
static inline void gate_with(const Number* gate, const Number* up, Number* y, Index count) {
    const auto some = [](const Number* gate, const Number* up, Number* y) {
        const Lanes activated = Function::template of<Number>(load_lanes(gate));
        store_lanes(round_lanes<Number>(activated) * load_lanes(up), y);
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

// y = activation(gate) * up, elementwise, of neighbours.
template <typename Number>
static inline void gate_numbers(Activation activation, const Number* gate, const Number* up, Number* y, Index count) {
    if (activation == SILU) return gate_with<Silu>(gate, up, y, count);
    gate_with<GeluTanh>(gate, up, y, count);
}

template <typename Number>
void rotate_and_store(const Heads& heads);
