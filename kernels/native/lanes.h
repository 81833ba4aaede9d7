// Sixteen float32 numbers that are computed with together; the compiler splits them where registers are narrower.
#pragma once

#include "number.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr Index LANES = 16;

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

static inline Lanes load_lanes(const float* numbers) {
    Lanes lanes;
    std::memcpy(&lanes, numbers, sizeof lanes);
    return lanes;
}

static inline Lanes load_lanes(const BFloat16* numbers) {
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, numbers, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    return (Lanes)words;
}

static inline void store_lanes(Lanes lanes, float* numbers) { std::memcpy(numbers, &lanes, sizeof lanes); }

static inline void store_lanes(Lanes lanes, BFloat16* numbers) {
#ifdef __AVX512BF16__
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)lanes);
    std::memcpy(numbers, &rounded, sizeof rounded);
#else
    float single[LANES];
    store_lanes(lanes, single);
#pragma omp simd
    for (Index i = 0; i < LANES; ++i) numbers[i] = from_float<BFloat16>(single[i]);
#endif
}
