// Copies of an adapter's tensors that say how large the numbers are, on the calling thread alone.

#include "number.h"

#include <algorithm>

// target [num_columns, num_rows] = scale * source^T for source [num_rows, num_columns], computed in float32. `source` and
// `target` count bytes. As in Python.
struct Copy {
    Index source, target, num_rows, num_columns, types;
};

// target = scale * source; returns the largest magnitude that was written, not a number if one was not finite.
template <typename Source, typename Target>
static inline float copy_row(const Source* source, Target* target, Index count, float scale) {
    float largest = 0, bad = 0;
#pragma omp simd reduction(max : largest) reduction(+ : bad)
    for (Index i = 0; i < count; ++i) {
        target[i] = from_float<Target>(to_float(source[i]) * scale);
        const float magnitude = std::fabs(to_float(target[i]));
        largest = magnitude > largest ? magnitude : largest;
        bad += magnitude * 0.0f;
    }
    return largest + bad;
}

// Numbers of one source row lie in a line, those of one target row too: they meet in a tile in the nearest cache.
template <typename Source, typename Target>
static float transpose(const Source* source, Target* target, Index num_rows, Index num_columns, float scale) {
    constexpr Index ROWS = 64, COLUMNS = 16;
    float tile[COLUMNS][ROWS], largest = 0, bad = 0;
    for (Index row = 0; row < num_rows; row += ROWS)
        for (Index column = 0; column < num_columns; column += COLUMNS) {
            const Index height = std::min(ROWS, num_rows - row), width = std::min(COLUMNS, num_columns - column);
            for (Index i = 0; i < height; ++i)
                for (Index j = 0; j < width; ++j) tile[j][i] = to_float(source[(row + i) * num_columns + column + j]);
            for (Index j = 0; j < width; ++j) {
                const float found = copy_row(tile[j], target + (column + j) * num_rows + row, height, scale);
                largest = std::max(largest, found);
                bad += found * 0.0f;
            }
        }
    return largest + bad;
}

template <typename Source, typename Target>
static float copy(const Copy& copy, float scale, const char* from, char* to) {
    const auto* source = reinterpret_cast<const Source*>(from + copy.source);
    auto* target = reinterpret_cast<Target*>(to + copy.target);
    return copy.num_columns == 1 ? copy_row(source, target, copy.num_rows, scale)
                                 : transpose(source, target, copy.num_rows, copy.num_columns, scale);
}

// By the source's type, then by the target's: float32, bfloat16, float16.
static constexpr float (*BY_TYPES[])(const Copy&, float, const char*, char*) = {
    copy<float, float>,    copy<float, BFloat16>,    copy<float, Float16>,
    copy<BFloat16, float>, copy<BFloat16, BFloat16>, copy<BFloat16, Float16>,
    copy<Float16, float>,  copy<Float16, BFloat16>,  copy<Float16, Float16>,
};

// `largest` [count] gets what is largest in each target.
extern "C" void copy_measured(const Copy* copies, const float* scales, Index count, const char* from, char* to,
                              float* largest) {
    for (Index i = 0; i < count; ++i) largest[i] = BY_TYPES[copies[i].types](copies[i], scales[i], from, to);
}
