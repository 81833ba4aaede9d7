// Inner products of a row of numbers with one or several others, summed in float32.
#pragma once

#include "number.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// sums[r] = x . rows[r], the rows `stride` apart.
template <int ROWS, typename Number>
static inline void dot_rows(const Number* x, const Number* rows, Index stride, Index length, float* sums) {
    for (int r = 0; r < ROWS; ++r) {
        const Number* row = rows + r * stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (Index i = 0; i < length; ++i) sum += to_float(x[i]) * to_float(row[i]);
        sums[r] = sum;
    }
}

#ifdef __AVX512BF16__

static inline __m512bh load_pairs(const BFloat16* numbers, __mmask32 mask) {
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, numbers);
}

// The sums of 16 registers, as one: a tree of additions between neighbours.
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

template <int ROWS>
static inline void dot_rows(const BFloat16* x, const BFloat16* rows, Index stride, Index length, float* sums) {
    __m512 totals[ROWS] = {};
    for (Index i = 0; i < length; i += 32) {
        const Index left = length - i;
        const __mmask32 mask = left >= 32 ? ~__mmask32(0) : (__mmask32(1) << left) - 1;
        const __m512bh inputs = load_pairs(x + i, mask);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r)
            totals[r] = _mm512_dpbf16_ps(totals[r], inputs, load_pairs(rows + r * stride + i, mask));
    }
    if constexpr (ROWS == 16) {
        _mm512_storeu_ps(sums, sum_each(totals));
    } else {
        for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_reduce_add_ps(totals[r]);
    }
}

#endif
