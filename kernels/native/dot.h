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

// Two numbers, again and again.
static inline __m512bh broadcast_pair(const void* numbers) {
    int both;
    std::memcpy(&both, numbers, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
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

// totals[r] += x . rows[r] of 32 numbers, or of those in the mask. Rows in fours, so that few registers hold all addresses.
template <int ROWS>
static inline void dot_block(__m512* totals, const BFloat16* x, const BFloat16* rows, Index stride, __mmask32 mask) {
    const __m512bh inputs = load_pairs(x, mask);
    const BFloat16* row = rows;
    const Index three = 3 * stride;
#pragma GCC unroll 4
    for (int r = 0; r + 4 <= ROWS; r += 4) {
        totals[r] = _mm512_dpbf16_ps(totals[r], inputs, load_pairs(row, mask));
        totals[r + 1] = _mm512_dpbf16_ps(totals[r + 1], inputs, load_pairs(row + stride, mask));
        totals[r + 2] = _mm512_dpbf16_ps(totals[r + 2], inputs, load_pairs(row + 2 * stride, mask));
        totals[r + 3] = _mm512_dpbf16_ps(totals[r + 3], inputs, load_pairs(row + three, mask));
        row += 4 * stride;
        asm("" : "+r"(row));  // else the compiler keeps all sixteen addresses
    }
    for (int r = ROWS / 4 * 4; r < ROWS; ++r)
        totals[r] = _mm512_dpbf16_ps(totals[r], inputs, load_pairs(rows + r * stride, mask));
}

template <int ROWS>
static inline void dot_rows(const BFloat16* x, const BFloat16* rows, Index stride, Index length, float* sums) {
    __m512 totals[ROWS] = {};
    Index i = 0;
    for (; i + 32 <= length; i += 32) dot_block<ROWS>(totals, x + i, rows + i, stride, ~__mmask32(0));
    if (i < length) dot_block<ROWS>(totals, x + i, rows + i, stride, (__mmask32(1) << (length - i)) - 1);
    if constexpr (ROWS == 16) {
        _mm512_storeu_ps(sums, sum_each(totals));
    } else {
        for (int r = 0; r < ROWS; ++r) sums[r] = _mm512_reduce_add_ps(totals[r]);
    }
}

#endif
