// Rows of bfloat16 numbers in registers.
#pragma once

#include "number.h"

#ifdef __AVX512BF16__

#include <immintrin.h>

constexpr Index HALF = 32;  // numbers in a register of 64 bytes

// `count` numbers of a row, zeros behind them.
static inline __m512i load_row(const BFloat16* row, Index count) {
    if (count >= HALF) return _mm512_loadu_si512(row);
    return count > 0 ? _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, row) : _mm512_setzero_si512();
}

#endif
