// Sixteen float32 numbers that are computed with together; the compiler splits them where registers are narrower.
#pragma once

#include "number.h"

#ifdef __AVX512F__
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
#ifdef __AVX512F__  // compilers widen halves of the register one by one
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
    return (Lanes)_mm512_slli_epi32(words, 16);
#else
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, numbers, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    return (Lanes)words;
#endif
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

// The lanes [begin, end), and `other` in place of the rest.
static inline Lanes keep_lanes(Lanes lanes, Index begin, Index end, float other) {
    const Lanes places = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const auto first = static_cast<float>(begin), last = static_cast<float>(end);
    return ((places >= first) & (places < last)) ? lanes : Lanes{} + other;
}

// Sum and largest of the lanes, in a tree, which is shorter than one after the other.
#ifdef __AVX512F__
static inline float sum_of(Lanes lanes) { return _mm512_reduce_add_ps((__m512)lanes); }
static inline float largest_of(Lanes lanes) { return _mm512_reduce_max_ps((__m512)lanes); }
#else
static inline float sum_of(Lanes lanes) {
    for (Index width = LANES / 2; width > 0; width /= 2)
        for (Index i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

static inline float largest_of(Lanes lanes) {
    for (Index width = LANES / 2; width > 0; width /= 2)
        for (Index i = 0; i < width; ++i) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
    return lanes[0];
}
#endif
