// Pairs of bfloat16 numbers as words, sixteen to a register.
#pragma once

#include "number.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

constexpr Index WORDS = 16;  // in a register
constexpr Index HALF = 32;   // numbers in a register

// `count` numbers of a row, zeros behind them.
static inline __m512i load_row(const BFloat16* row, Index count) {
    if (count >= HALF) return _mm512_loadu_si512(row);
    return count > 0 ? _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, row) : _mm512_setzero_si512();
}

// Rows of 16 words become columns.
static inline void transpose(__m512i* rows) {
    __m512i pairs[WORDS], fours[WORDS];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        fours[4 * i] = _mm512_unpacklo_epi64(pairs[4 * i], pairs[4 * i + 2]);
        fours[4 * i + 1] = _mm512_unpackhi_epi64(pairs[4 * i], pairs[4 * i + 2]);
        fours[4 * i + 2] = _mm512_unpacklo_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
        fours[4 * i + 3] = _mm512_unpackhi_epi64(pairs[4 * i + 1], pairs[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i low = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0x88);
        const __m512i low_odd = _mm512_shuffle_i32x4(fours[i], fours[i + 4], 0xdd);
        const __m512i high_odd = _mm512_shuffle_i32x4(fours[i + 8], fours[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(low, high, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
    }
}

// Two rows' numbers in turn: those of the first 16 columns, then of the others.
static inline void interleave(__m512i even, __m512i odd, __m512i* first, __m512i* second) {
    alignas(64) static constexpr uint16_t LOW[HALF] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                       8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(WORDS));
    *first = _mm512_permutex2var_epi16(even, low, odd);
    *second = _mm512_permutex2var_epi16(even, high, odd);
}

#endif
