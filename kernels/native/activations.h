// What stands between the products of an MLP: an activation, which may be a gate.
#pragma once

#include "lanes.h"

#include <algorithm>

enum Activation : Index { SILU, GELU_TANH, GELU, RELU, RELU_SQUARED };

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

// x P(X < x) of a standard normal X. The smaller of P(X < x) and P(X > x) is erfc(z) / 2 with z = |x| / sqrt(2), and
// erfc(z) = t e^(-z^2 + p(t)) with t = 1 / (1 + z / 2), to 2e-7 of itself (Numerical Recipes, 6.2).
struct Gelu {
    template <typename Number>
    static Lanes of(Lanes x) {
        const Lanes z = (x < 0 ? -x : x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
        Lanes p = t * 0.17087277f - 0.82215223f;
        p = p * t + 1.48851587f;
        p = p * t - 1.13520398f;
        p = p * t + 0.27886807f;
        p = p * t - 0.18628806f;
        p = p * t + 0.09678418f;
        p = p * t + 0.37409196f;
        p = p * t + 1.00002368f;
        const Lanes smaller = 0.5f * t * exp_for<Number>(p * t - 1.26551223f - z * z);
        return x * (x < 0 ? smaller : 1.0f - smaller);
    }
};

// max(x, 0); not a number stays none.
struct Relu {
    template <typename Number>
    static Lanes of(Lanes x) {
        return x < 0 ? Lanes{} : x;
    }
};

struct ReluSquared {
    template <typename Number>
    static Lanes of(Lanes x) {
        const Lanes root = Relu::of<Number>(x);
        return root * root;
    }
};

// Calls compute.operator()<Function>() for the function of an activation.
template <typename Compute>
static inline void with_function(Activation activation, const Compute& compute) {
    switch (activation) {
        case SILU: return compute.template operator()<Silu>();
        case GELU_TANH: return compute.template operator()<GeluTanh>();
        case GELU: return compute.template operator()<Gelu>();
        case RELU: return compute.template operator()<Relu>();
        case RELU_SQUARED: return compute.template operator()<ReluSquared>();
    }
}

// Calls some(a, b, y) for lanes of numbers each; the last ones are filled up with zeros.
template <typename Number, typename Some>
static inline void by_lanes(const Number* a, const Number* b, Number* y, Index count, const Some& some) {
    Index i = 0;
    for (; i + LANES <= count; i += LANES) some(a + i, b + i, y + i);
    if (i == count) return;
    Number last_a[LANES] = {}, last_b[LANES] = {}, last_y[LANES];
    std::copy(a + i, a + count, last_a);
    std::copy(b + i, b + count, last_b);
    some(last_a, last_b, last_y);
    std::copy_n(last_y, count - i, y + i);
}

// y = activation(gate) * up, elementwise, of neighbours.
template <typename Number>
static inline void gate_numbers(Activation activation, const Number* gate, const Number* up, Number* y, Index count) {
    with_function(activation, [&]<typename Function>() {
        by_lanes(gate, up, y, count, [](const Number* gate, const Number* up, Number* y) {
            const Lanes activated = Function::template of<Number>(load_lanes(gate));
            store_lanes(round_lanes<Number>(activated) * load_lanes(up), y);
        });
    });
}

// y = activation(x), elementwise, of neighbours; y may be x.
template <typename Number>
static inline void activate_numbers(Activation activation, const Number* x, Number* y, Index count) {
    with_function(activation, [&]<typename Function>() {
        by_lanes(x, x, y, count, [](const Number* x, const Number*, Number* y) {
            store_lanes(Function::template of<Number>(load_lanes(x)), y);
        });
    });
}
