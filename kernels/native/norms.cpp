// RMSNorm and LayerNorm, in one pass over a row for its mean, one for its spread and one for the result.

#include "norms.h"

#include "lanes.h"
#include "threads.h"

#include <cmath>
#include <type_traits>

template <typename Number>
static inline float mean_of(const Number* x, Index width) {
    const Index whole = width / LANES * LANES;
    Lanes sums = {};
    for (Index i = 0; i < whole; i += LANES) sums += load_lanes(x + i);
    float total = sum_of(sums);
    for (Index i = whole; i < width; ++i) total += to_float(x[i]);
    return total / width;
}

// The mean of (x - mean)^2.
template <typename Number>
static inline float spread_of(const Number* x, Index width, float mean) {
    const Index whole = width / LANES * LANES;
    Lanes squares = {};
    for (Index i = 0; i < whole; i += LANES) squares += (load_lanes(x + i) - mean) * (load_lanes(x + i) - mean);
    float total = sum_of(squares);
    for (Index i = whole; i < width; ++i) total += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
    return total / width;
}

template <bool ADD, bool CENTERS, typename Number, typename Weight>
static inline void norm_row(const Number* x, const Norm& norm, Number* y) {
    constexpr bool ROUNDS_FIRST = std::is_same_v<Number, Weight> && !CENTERS;
    const Index width = norm.width, whole = width / LANES * LANES;
    const auto* weight = static_cast<const Weight*>(norm.weight);
    const float mean = CENTERS ? mean_of(x, width) : 0.0f;
    const float scale = 1.0f / std::sqrt(spread_of(x, width, mean) + norm.epsilon);
    for (Index i = 0; i < whole; i += LANES) {
        Lanes row = (load_lanes(x + i) - mean) * scale;
        if (ROUNDS_FIRST) row = round_lanes<Number>(row);
        row *= load_lanes(weight + i);
        if (CENTERS) row += load_lanes(norm.bias + i);
        if (ADD) row = round_lanes<Number>(row) + load_lanes(y + i);
        store_lanes(row, y + i);
    }
    for (Index i = whole; i < width; ++i) {
        float number = (to_float(x[i]) - mean) * scale;
        if (ROUNDS_FIRST) number = to_float(from_float<Number>(number));
        number *= to_float(weight[i]);
        if (CENTERS) number += norm.bias[i];
        if (ADD) number = to_float(from_float<Number>(number)) + to_float(y[i]);
        y[i] = from_float<Number>(number);
    }
}

template <bool ADD, bool CENTERS, typename Number, typename Weight>
static void norm_rows(const Number* x, const Norm& norm, Number* y, Index count) {
    parallel_ranges(count / norm.width, count, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row)
            norm_row<ADD, CENTERS, Number, Weight>(x + row * norm.width, norm, y + row * norm.width);
    });
}

template <bool ADD, typename Number>
static void norm_or_add(const Number* x, const Norm& norm, Number* y, Index count) {
    if (norm.bias) return norm_rows<ADD, true, Number, float>(x, norm, y, count);
    if (norm.is_wide) return norm_rows<ADD, false, Number, float>(x, norm, y, count);
    norm_rows<ADD, false, Number, Number>(x, norm, y, count);
}

template <typename Number>
void normalize(const Number* x, const Norm& norm, Number* y, Index count, bool add) {
    add ? norm_or_add<true>(x, norm, y, count) : norm_or_add<false>(x, norm, y, count);
}

template void normalize<float>(const float*, const Norm&, float*, Index, bool);
template void normalize<BFloat16>(const BFloat16*, const Norm&, BFloat16*, Index, bool);
template void normalize<Float16>(const Float16*, const Norm&, Float16*, Index, bool);

extern "C" {
void normalize_f32(const float* x, const Norm* norm, float* y, Index count) { normalize(x, *norm, y, count, false); }
void normalize_bf16(const BFloat16* x, const Norm* norm, BFloat16* y, Index count) { normalize(x, *norm, y, count, false); }
void normalize_f16(const Float16* x, const Norm* norm, Float16* y, Index count) { normalize(x, *norm, y, count, false); }
}
