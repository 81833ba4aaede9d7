// Inner products of a row of numbers with one or several others, summed in float32.
#pragma once

#include "lanes.h"

// sums[r] = x . rows[r], the rows `stride` apart, ROWS of them together.
template <int ROWS, typename Number>
static inline void dot_lanes(const Number* x, const Number* rows, Index stride, Index length, float* sums) {
    Lanes totals[ROWS] = {};
    Index i = 0;
    for (; i + LANES <= length; i += LANES) {
        const Lanes inputs = load_lanes(x + i);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) totals[r] += inputs * load_lanes(rows + r * stride + i);
    }
    if constexpr (ROWS == LANES)
        store_lanes(sum_each(totals), sums);
    else
        for (int r = 0; r < ROWS; ++r) sums[r] = sum_of(totals[r]);
    for (; i < length; ++i)
        for (int r = 0; r < ROWS; ++r) sums[r] += to_float(x[i]) * to_float(rows[r * stride + i]);
}

// The same. With few registers the sums of several rows would go to memory and back: row by row, and in a loop that the
// compiler turns to its own vectors.
template <int ROWS, typename Number>
static inline void dot_rows(const Number* x, const Number* rows, Index stride, Index length, float* sums) {
    if constexpr (HAS_MANY_REGISTERS) return dot_lanes<ROWS>(x, rows, stride, length, sums);
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
