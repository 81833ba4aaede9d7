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

#define MEASURED_COPIES(SOURCE, TARGET, NAME)                                                                        \
    float copy_measured_##NAME(const SOURCE* source, TARGET* target, Index count) {                                  \
        return copy_measured(source, target, count);                                                                 \
    }                                                                                                                \
    float transpose_measured_##NAME(const SOURCE* source, TARGET* target, Index rows, Index columns, float scale) {  \
        return transpose_measured(source, target, rows, columns, scale);                                             \
    }

extern "C" {
MEASURED_COPIES(float, float, f32_f32)
MEASURED_COPIES(float, BFloat16, f32_bf16)
MEASURED_COPIES(float, Float16, f32_f16)
MEASURED_COPIES(BFloat16, float, bf16_f32)
MEASURED_COPIES(BFloat16, BFloat16, bf16_bf16)
MEASURED_COPIES(BFloat16, Float16, bf16_f16)
MEASURED_COPIES(Float16, float, f16_f32)
MEASURED_COPIES(Float16, BFloat16, f16_bf16)
MEASURED_COPIES(Float16, Float16, f16_f16)
}
