// Products of bytes for 16 outputs at once: levels without sign with inputs with one, four of each to a sum, as the
// processor has them (VNNI), or as AVX2 puts them together. The sums are whole numbers, so both give the same.
//
// With AVX2 two products are added in 16 bits, which 255 * 127 twice would not fit. Levels of 8 bits are therefore taken
// less their middle there, as numbers from -127 to 127; those of 4 bits fit.
#pragma once

#include "lanes.h"

#if defined(__AVX512VNNI__)
#define HAS_BYTE_PRODUCTS 1

typedef __m512i Levels;  // [16][4]
typedef __m512i Sums;
typedef __m512 Totals;

static inline Levels load_levels(const uint8_t* levels) { return _mm512_loadu_si512(levels); }
static inline Levels lower_halves(Levels levels) { return _mm512_and_si512(levels, _mm512_set1_epi8(15)); }
static inline Levels upper_halves(Levels levels) { return lower_halves(_mm512_srli_epi16(levels, 4)); }

// What the sums of a group start with, so that they are of levels less their middle; `sum` is that of its inputs.
template <int BITS>
static inline Sums first_sums(int32_t sum) {
    return _mm512_set1_epi32(-(1 << (BITS - 1)) * sum);
}

template <int BITS>
static inline Sums add_products(Sums sums, Levels levels, int four) {
    return _mm512_dpbusd_epi32(sums, levels, _mm512_set1_epi32(four));
}

static inline Totals load_scales(const BFloat16* scales) { return (Totals)load_lanes(scales); }

static inline Totals add_scaled(Totals totals, Sums sums, Totals scales, float scale) {
    return totals + _mm512_cvtepi32_ps(sums) * (scales * _mm512_set1_ps(scale));
}

static inline Lanes to_lanes(Totals totals) { return (Lanes)totals; }

#elif defined(__AVX2__)
#define HAS_BYTE_PRODUCTS 1
#include <immintrin.h>

struct Levels {
    __m256i half[2];
};
struct Sums {
    __m256i half[2];
};
struct Totals {
    __m256 half[2];
};

static inline Levels load_levels(const uint8_t* levels) {
    const auto* here = reinterpret_cast<const __m256i*>(levels);
    return {_mm256_loadu_si256(here), _mm256_loadu_si256(here + 1)};
}

static inline Levels lower_halves(Levels levels) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(levels.half[0], mask), _mm256_and_si256(levels.half[1], mask)};
}

static inline Levels upper_halves(Levels levels) {
    return lower_halves({_mm256_srli_epi16(levels.half[0], 4), _mm256_srli_epi16(levels.half[1], 4)});
}

template <int BITS>
static inline Sums first_sums(int32_t sum) {
    const __m256i first = _mm256_set1_epi32(BITS == 8 ? 0 : -(1 << (BITS - 1)) * sum);
    return {first, first};
}

template <int BITS>
static inline __m256i products(__m256i levels, __m256i inputs) {
    if constexpr (BITS == 8) {
        const __m256i numbers = _mm256_xor_si256(levels, _mm256_set1_epi8(-128));
        inputs = _mm256_sign_epi8(inputs, numbers);
        levels = _mm256_abs_epi8(numbers);
    }
    return _mm256_madd_epi16(_mm256_maddubs_epi16(levels, inputs), _mm256_set1_epi16(1));
}

template <int BITS>
static inline Sums add_products(Sums sums, Levels levels, int four) {
    const __m256i inputs = _mm256_set1_epi32(four);
    return {_mm256_add_epi32(sums.half[0], products<BITS>(levels.half[0], inputs)),
            _mm256_add_epi32(sums.half[1], products<BITS>(levels.half[1], inputs))};
}

static inline __m256 load_eight(const BFloat16* numbers) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

static inline Totals load_scales(const BFloat16* scales) { return {load_eight(scales), load_eight(scales + 8)}; }

static inline Totals add_scaled(Totals totals, Sums sums, Totals scales, float scale) {
    const __m256 all = _mm256_set1_ps(scale);
    return {totals.half[0] + _mm256_cvtepi32_ps(sums.half[0]) * (scales.half[0] * all),
            totals.half[1] + _mm256_cvtepi32_ps(sums.half[1]) * (scales.half[1] * all)};
}

static inline Lanes to_lanes(Totals totals) {
    Lanes lanes;
    std::memcpy(&lanes, &totals, sizeof lanes);
    return lanes;
}

#endif
