// The tokens of a batch as a kernel's input: num_tokens rows of d_in numbers, x_stride apart.
#pragma once

#include "number.h"

struct Tokens {
    const void* x;
    Index num_tokens;
    Index d_in;
    Index x_stride;
};

// Some tokens by some columns of what is computed for them.
struct Block {
    Index token, num_tokens, column, num_columns;
};
