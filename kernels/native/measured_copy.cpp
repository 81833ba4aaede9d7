// Copies of an adapter's tensors that say how large the numbers are, on the calling thread alone.

#include "number.h"

#include <algorithm>

// target = scale * source, the numbers of the source `stride` apart; returns the largest magnitude that was written, not a
// number if one was not finite.
template <typename Source, typename Target>
static inline float copy_scaled(const Source* source, Index stride, Target* target, Index count, float scale) {
    float largest = 0, bad = 0;
#pragma omp simd reduction(max : largest) reduction(+ : bad)
    for (Index i = 0; i < count; ++i) {
        target[i] = from_float<Target>(to_float(source[i * stride]) * scale);
        const float magnitude = std::fabs(to_float(target[i]));
        largest = magnitude > largest ? magnitude : largest;
        bad += magnitude * 0.0f;
    }
    return largest + bad;
}

template <typename Source, typename Target>
static float copy_measured(const Source* source, Target* target, Index count) {
    return copy_scaled(source, 1, target, count, 1.0f);
}

// target [columns, rows] = scale * source^T for source [rows, columns].
template <typename Source, typename Target>
static float transpose_measured(const Source* source, Target* target, Index num_rows, Index num_columns, float scale) {
    constexpr Index BLOCK = 64;  // rows that stay in the first cache
    float largest = 0, bad = 0;
    for (Index row = 0; row < num_rows; row += BLOCK)
        for (Index column = 0; column < num_columns; ++column) {
            const float found = copy_scaled(source + row * num_columns + column, num_columns,
                                            target + column * num_rows + row, std::min(BLOCK, num_rows - row), scale);
            largest = std::max(largest, found);
            bad += found * 0.0f;
        }
    return largest + bad;
}

extern "C" {
float copy_measured_f32_f32(const float* source, float* target, Index count) {
    return copy_measured(source, target, count);
}
float transpose_measured_f32_f32(const float* source, float* target, Index rows, Index columns, float scale) {
    return transpose_measured(source, target, rows, columns, scale);
}
float copy_measured_f32_bf16(const float* source, BFloat16* target, Index count) {
    return copy_measured(source, target, count);
}
float transpose_measured_f32_bf16(const float* source, BFloat16* target, Index rows, Index columns, float scale) {
    return transpose_measured(source, target, rows, columns, scale);
}
float copy_measured_bf16_f32(const BFloat16* source, float* target, Index count) {
    return copy_measured(source, target, count);
}
float transpose_measured_bf16_f32(const BFloat16* source, float* target, Index rows, Index columns, float scale) {
    return transpose_measured(source, target, rows, columns, scale);
}
float copy_measured_bf16_bf16(const BFloat16* source, BFloat16* target, Index count) {
    return copy_measured(source, target, count);
}
float transpose_measured_bf16_bf16(const BFloat16* source, BFloat16* target, Index rows, Index columns, float scale) {
    return transpose_measured(source, target, rows, columns, scale);
}
}
