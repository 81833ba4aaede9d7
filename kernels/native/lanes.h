// Sixteen float32 numbers that are computed with together; the compiler splits them where registers are narrower.
#pragma once

#include "number.h"

#include <type_traits>

#ifdef __AVX__
#include <immintrin.h>
#endif

constexpr Index LANES = 16;

// 32 of 16 numbers each; else 16 of 8.
#ifdef __AVX512F__
constexpr bool HAS_MANY_REGISTERS = true;
#else
constexpr bool HAS_MANY_REGISTERS = false;
#endif

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

static inline Lanes load_lanes(const float* numbers) {
    Lanes lanes;
    std::memcpy(&lanes, numbers, sizeof lanes);
    return lanes;
}

#ifdef __AVX512F__
static inline Lanes widen(__m256i halves) { return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }
#endif

static inline Lanes load_lanes(const BFloat16* numbers) {
#ifdef __AVX512F__  // compilers widen halves of the register one by one
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
#else
    typedef uint16_t Halves __attribute__((vector_size(LANES * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(LANES * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, numbers, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    return (Lanes)words;
#endif
}

static inline Lanes load_lanes(const Float16* numbers) {
    Lanes lanes;
#ifdef __AVX512F__
    lanes = (Lanes)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers)));
#elif defined(__F16C__)
    const auto* halves = reinterpret_cast<const __m128i*>(numbers);
    const __m256 both[] = {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    std::memcpy(&lanes, both, sizeof lanes);
#else
    for (Index i = 0; i < LANES; ++i) lanes[i] = to_float(numbers[i]);
#endif
    return lanes;
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

static inline void store_lanes(Lanes lanes, Float16* numbers) {
#ifdef __AVX512F__
    const __m256i rounded = _mm512_cvtps_ph((__m512)lanes, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(numbers, &rounded, sizeof rounded);
#elif defined(__F16C__)
    __m256 both[2];
    std::memcpy(both, &lanes, sizeof both);
    const __m128i rounded[] = {_mm256_cvtps_ph(both[0], _MM_FROUND_TO_NEAREST_INT),
                               _mm256_cvtps_ph(both[1], _MM_FROUND_TO_NEAREST_INT)};
    std::memcpy(numbers, rounded, sizeof rounded);
#else
    for (Index i = 0; i < LANES; ++i) numbers[i] = from_float<Float16>(lanes[i]);
#endif
}

// What store_lanes makes of the lanes, as lanes again.
template <typename Number>
static inline Lanes round_lanes(Lanes lanes) {
#ifdef __AVX512BF16__  // without a detour through memory
    if constexpr (std::is_same_v<Number, BFloat16>) return widen((__m256i)_mm512_cvtneps_pbh((__m512)lanes));
#endif
    Number rounded[LANES];
    store_lanes(lanes, rounded);
    return load_lanes(rounded);
}

// e^x to 2e-7 of itself; 0 below -87, infinity above 89.
static inline Lanes exp_lanes(Lanes x) {
#ifdef __AVX512F__  // half as many instructions: the last one scales, and knows what is too large or not a number
    const __m512 least = _mm512_set1_ps(-87.0f), most = _mm512_set1_ps(89.0f);
    const __m512 clamped = _mm512_max_ps(least, _mm512_min_ps(most, (__m512)x));
    const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, least, _CMP_NLT_UQ);
    const __m512 power = _mm512_roundscale_ps((__m512)((Lanes)clamped * 1.44269504f), 0);
    const Lanes rest = ((Lanes)clamped - (Lanes)power * 0.693359375f) + (Lanes)power * 2.12194440e-4f;
    return (Lanes)_mm512_maskz_scalef_ps(is_normal, (__m512)exp_of_rest(rest), power);
#else
#pragma omp simd
    for (Index i = 0; i < LANES; ++i) x[i] = fast_exp(x[i]);
    return x;
#endif
}

// e^x as exactly as what is rounded to Number needs: for bfloat16 to 1e-5 of itself; never below 2^-126.
template <typename Number>
static inline Lanes exp_for(Lanes x) {
#ifdef __AVX512DQ__
    if constexpr (std::is_same_v<Number, BFloat16>) {  // 2^t = 2^floor(t) 2^rest, the second a polynomial on [0, 1)
        const __m512 least = _mm512_set1_ps(-126.0f);  // below it is no normal number, and processors are slow
        const __m512 power = _mm512_max_ps(least, (__m512)(x * 1.44269504f));
        const Lanes rest = (Lanes)_mm512_reduce_ps(power, _MM_FROUND_TO_NEG_INF);
        Lanes result = rest * 0.0135341706f + 0.0520114633f;
        result = result * rest + 0.241442749f;
        result = result * rest + 0.693003838f;
        result = result * rest + 1.00000259f;
        return (Lanes)_mm512_scalef_ps((__m512)result, power);
    }
#endif
    return exp_lanes(x);
}

// tanh(x) to 1e-6 of itself: near zero by its series, which the difference of numbers near one would lose.
static inline Lanes tanh_lanes(Lanes x) {
    const Lanes square = x * x, magnitude = x < 0 ? -x : x, power = exp_lanes(-2.0f * magnitude);
    const Lanes series = ((-0.0539682540f * square + 0.133333333f) * square - 0.333333333f) * square * x + x;
    const Lanes ratio = (1.0f - power) / (1.0f + power);
    return magnitude < 0.125f ? series : (x < 0 ? -ratio : ratio);
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

#ifdef __AVX512F__
// The sum of each of 16 rows, as lanes: a tree of additions between neighbours, the same for every row.
static inline __m512 sum_each(const __m512* rows) {
    __m512 pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
        pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                                 _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512d low = _mm512_castps_pd(pairs[2 * i]), high = _mm512_castps_pd(pairs[2 * i + 1]);
        fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                                 _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
        eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                                  _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                         _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}
#else
static inline Lanes sum_each(const Lanes* rows) {
    Lanes sums;
    for (Index i = 0; i < LANES; ++i) sums[i] = sum_of(rows[i]);
    return sums;
}
#endif
