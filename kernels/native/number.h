// Numbers as the kernels see them: float32 as it is, bfloat16 and float16 as their 16 bits; all are computed with in
// float32.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

using Index = int64_t;

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

static inline float float_of(uint32_t bits) {
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
}

static inline uint32_t bits_of(float number) {
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return bits;
}

static inline float to_float(float number) { return number; }

static inline float to_float(BFloat16 number) { return float_of(static_cast<uint32_t>(number.bits) << 16); }

// In a form that compilers vectorize: the exponent is counted from another number, and fractions below 2^-14 have none.
static inline float to_float(Float16 number) {
    const uint32_t magnitude = static_cast<uint32_t>(number.bits & 0x7fff) << 13, sign = (number.bits & 0x8000u) << 16;
    const uint32_t normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
    const uint32_t fraction = bits_of(float_of(magnitude + (113u << 23)) - 0x1p-14f);
    const uint32_t finite = magnitude < (1u << 23) ? fraction : normal;
    return float_of(sign | (magnitude < (31u << 23) ? finite : special));
}

template <typename Number>
static inline Number from_float(float number);

template <>
inline float from_float<float>(float number) { return number; }

// Rounds to nearest, ties to even; what is not a number stays so.
template <>
inline BFloat16 from_float<BFloat16>(float number) {
    const uint32_t bits = bits_of(number);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return {static_cast<uint16_t>(is_nan ? 0x7fc0 : rounded)};
}

// Rounds to nearest, ties to even; what is too large becomes infinity.
template <>
inline Float16 from_float<Float16>(float number) {
    const uint32_t bits = bits_of(number), magnitude = bits & 0x7fffffff;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t fraction = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);  // its last bit is worth 2^-24
    const uint32_t finite = magnitude < (113u << 23) ? fraction : normal;
    const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    return {static_cast<uint16_t>((magnitude < bits_of(65520.0f) ? finite : special) | ((bits >> 16) & 0x8000))};
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
    result *= float_of((static_cast<int32_t>(power) + 127) << 23);
    result = x < -87.0f ? 0.0f : result;
    result = x > 88.0f ? INFINITY : result;
    return x != x ? x : result;
}
