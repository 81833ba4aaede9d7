// Activations of tensors, for steps whose layers are not computed in one call.

#include "activations.h"

#include "threads.h"

template <typename Number>
static void gated_product(Activation activation, const Number* gate, const Number* up, Number* y, Index count) {
    parallel_ranges(count, count, [&](Index begin, Index end) {
        gate_numbers(activation, gate + begin, up + begin, y + begin, end - begin);
    });
}

template <typename Number>
static void activate(Activation activation, Number* x, Index count) {
    parallel_ranges(count, count, [&](Index begin, Index end) {
        activate_numbers(activation, x + begin, x + begin, end - begin);
    });
}

extern "C" {
void gated_product_f32(Activation activation, const float* gate, const float* up, float* y, Index count) {
    gated_product(activation, gate, up, y, count);
}
void gated_product_bf16(Activation activation, const BFloat16* gate, const BFloat16* up, BFloat16* y, Index count) {
    gated_product(activation, gate, up, y, count);
}
void gated_product_f16(Activation activation, const Float16* gate, const Float16* up, Float16* y, Index count) {
    gated_product(activation, gate, up, y, count);
}
void activate_f32(Activation activation, float* x, Index count) { activate(activation, x, count); }
void activate_bf16(Activation activation, BFloat16* x, Index count) { activate(activation, x, count); }
void activate_f16(Activation activation, Float16* x, Index count) { activate(activation, x, count); }
}
