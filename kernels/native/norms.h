// The norms of a decoder: RMSNorm and LayerNorm.
#pragma once

#include "number.h"

// Of rows of `width`. Weights of the numbers' own type multiply what is rounded already, as in Llama; wide ones, which are
// float32, multiply before anything is rounded, as in Gemma.
struct Norm {
    const void* weight;  // null: there is no such norm
    const float* bias;   // of a LayerNorm, whose weights are wide; null: an RMSNorm
    Index width, is_wide;
    float epsilon;
};

// y = x / sqrt(mean(x^2) + eps) * w of an RMSNorm, y = (x - mean(x)) / sqrt(var(x) + eps) * w + b of a LayerNorm; or y += that,
// for `count` numbers.
template <typename Number>
void normalize(const Number* x, const Norm& norm, Number* y, Index count, bool add);
