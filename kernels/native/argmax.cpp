// The best token of each row of logits.

#include "number.h"
#include "threads.h"

#include <algorithm>
#include <cmath>

// The first place of the largest number of a row; -1 if it is not finite or a number is none.
template <typename Number>
static inline Index argmax_of_row(const Number* row, Index width) {
    constexpr Index BLOCK = 1024;  // numbers, of which one block is searched for the place
    float largest = -INFINITY;
    int num_bad = 0;
    Index first = 0;
    for (Index begin = 0; begin < width; begin += BLOCK) {
        float here = -INFINITY;
#pragma omp simd reduction(max : here) reduction(+ : num_bad)
        for (Index i = begin; i < std::min(begin + BLOCK, width); ++i) {
            const float number = to_float(row[i]);
            here = number > here ? number : here;
            num_bad += number != number;
        }
        if (here > largest) largest = here, first = begin;
    }
    if (num_bad || !(std::abs(largest) < INFINITY)) return -1;
    while (to_float(row[first]) != largest) ++first;
    return first;
}

template <typename Number>
static void argmax(const Number* x, Index num_rows, Index width, Index* places) {
    parallel_ranges(num_rows, num_rows * width, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row) places[row] = argmax_of_row(x + row * width, width);
    });
}

extern "C" {
void argmax_f32(const float* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void argmax_bf16(const BFloat16* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
void argmax_f16(const Float16* x, Index rows, Index width, Index* places) { argmax(x, rows, width, places); }
}
