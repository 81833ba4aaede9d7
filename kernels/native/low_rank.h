// What adapters add to the products of a group of modules that share an input (queries, keys and values; gate and up).
#pragma once

#include "tokens.h"

// A module's rank rows; `place` is that of its output in the group.
struct LowRankPart {
    const void* shrink_rows;  // [capacity, d_in]
    const void* shrink_bias;  // [capacity] or null
    const void* expand_rows;  // [capacity, d_out]
    Index d_out;
    Index place;
};

// Tokens [token_start, + num_tokens) by rank rows [row_start, + num_rows).
struct Segment {
    Index token_start, num_tokens, row_start, num_rows;
    const float* coefficients;  // [num_tokens, num_rows], rows coefficient_stride apart (0: one row for all tokens)
    Index coefficient_stride;
};

// Where a fusion's scores come from, and where its weights go; its rows lie in the pool from row_start:
// first those of the members, num_rows of them, then as many of the scores, then a row per member with has_member_keys.
struct FusionAttention {
    const void* shrink_rows;  // of the module with the attention
    const void* shrink_bias;  // or null
    Index token_start, num_tokens, row_start, num_rows, num_members;
    const Index* member_of_row;  // [num_rows]
    const uint8_t* allowed;      // [num_tokens, num_members], rows allowed_stride apart, or null for all
    Index allowed_stride;
    Index has_member_keys, has_base_member;
    float* weights;       // [num_tokens, num_members + has_base_member]
    float* coefficients;  // [num_tokens, num_rows]: each rank row's member's weight
};

// Some modules' rank rows, added once these attentions have set the coefficients of their fusions.
struct Addition {
    const FusionAttention* attentions;
    Index num_attentions;
    const LowRankPart* parts;
    Index num_parts;
};

// The additions of a group, and the segments of the step.
struct Additions {
    const Addition* additions;
    Index num_additions;
    const Segment* segments;
    Index num_segments;
};

// Outputs of a module, [num_tokens, d_out], rows `stride` apart.
struct Outputs {
    void* numbers;
    Index stride;

    template <typename Number>
    Number* at(Index token, Index column) const {
        return static_cast<Number*>(numbers) + token * stride + column;
    }
};

// What tokens weigh the rank rows of a group's additions with, c (A x + a); the calling thread keeps it until it makes the
// next. What they add to an output, times B, follows column by column, as soon as the output is there.
struct WeighedRows {
    Additions additions;
    const float* weighted;  // of each addition's parts, each segment's
    // Adds a block to the output at `place`, whose numbers begin with the block's first token.
    void (*expand)(const WeighedRows& rows, Index place, const Outputs& outputs, const Block& block);
};

template <typename Number>
WeighedRows weigh_rows(const Tokens& tokens, const Additions& additions);
