// Numbers as the kernels see them: float32 as it is, bfloat16 as its 16 bits; both are computed with in float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

using Index = int64_t;

struct BFloat16 {
    uint16_t bits;
};

static inline float to_float(float number) { return number; }

static inline float to_float(BFloat16 number) {
    const uint32_t bits = static_cast<uint32_t>(number.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

template <typename Number>
static inline Number from_float(float number);

template <>
inline float from_float<float>(float number) { return number; }

// Rounds to nearest, ties to even; what is not a number stays so.
template <>
inline BFloat16 from_float<BFloat16>(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return {static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded)};
}

// e^x for |x| up to ln(2) / 2, of a number or of several at once.
template <typename Real>
static inline Real exp_of_rest(Real rest) {
    Real result = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    result = result * rest + 8.3334519073e-3f;
    result = result * rest + 4.1665795894e-2f;
    result = result * rest + 1.6666665459e-1f;
    result = result * rest + 5.0000001201e-1f;
    return result * rest * rest + rest + 1.0f;
}

// e^x to 2e-7 of itself, in a form that compilers vectorize; 0 below -87, infinity above 88.
static inline float fast_exp(float x) {
    const float clamped = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
    const float power = std::nearbyint(clamped * 1.44269504f);
    const float rest = (clamped - power * 0.693359375f) + power * 2.12194440e-4f;
    float result = exp_of_rest(rest);
    const int32_t exponent_bits = (static_cast<int32_t>(power) + 127) << 23;
    float scale;
    std::memcpy(&scale, &exponent_bits, sizeof scale);
    result *= scale;
    result = x < -87.0f ? 0.0f : result;
    result = x > 88.0f ? INFINITY : result;
    return x != x ? x : result;
}
