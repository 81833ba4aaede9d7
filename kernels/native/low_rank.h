// What adapters add to the products of a group of modules that share an input (queries, keys and values; gate and up).
#pragma once

#include "tokens.h"

// A module's rank rows, for tile registers in panels (`rank_panels.h`); `place` is that of its output in the group.
struct LowRankPart {
    const void* shrink_rows;  // [capacity, d_in]
    const void* shrink_bias;  // [capacity] or null
    const void* expand_rows;  // [capacity, d_out]
    Index d_out;
    Index place;
};

// Tokens [token_start, + num_tokens) by rank rows [row_start, + num_rows), the first of a resident that has `extent`.
struct Segment {
    Index token_start, num_tokens, row_start, num_rows, extent;
    const float* coefficients;  // [num_tokens, num_rows], rows coefficient_stride apart (0: one row for all tokens)
    Index coefficient_stride;
};

// Where a fusion's scores come from, and where its weights go; its rows lie in the pool from row_start:
// first those of the members, num_rows of them, then as many of the scores, then a row per member with has_member_keys.
struct FusionAttention {
    const void* shrink_rows;  // of the module with the attention
    const void* shrink_bias;  // or null
    Index token_start, num_tokens, row_start, num_rows, extent, num_members;
    const Index* member_of_row;  // [num_rows]
    const uint8_t* allowed;      // [num_tokens, num_members], rows allowed_stride apart, or null for all
    Index allowed_stride;
    Index has_member_keys, has_base_member;
    float* weights;       // [num_tokens, num_members + has_base_member]
    float* coefficients;  // [num_tokens, num_rows]: each rank row's member's weight
};

// Some modules' rank rows, added once these attentions, which are at the first of them, have set the coefficients of their
// fusions' segments.
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

// What tokens weigh a module's rank rows with, c (A x + a), of each segment.
struct WeighedPart {
    const LowRankPart* part;
    const float* weighted;
};

// Those of a group's additions; the calling thread keeps them until it makes the next.
struct WeighedRows {
    Additions additions;
    const WeighedPart* parts;
    Index num_parts;
    const struct RankItems* items;  // where tile registers add them, or null
    // Adds a block to a part's outputs, whose numbers begin with the block's first token.
    void (*expand)(const WeighedRows& rows, const WeighedPart& part, const Outputs& outputs, const Block& block);
};

// What adapters add to the outputs of one module, times B: to sums by the product that has them (`rank_sums.h`), or block
// by block as soon as the outputs are there.
struct AddedRows {
    const WeighedRows* all;
    const WeighedPart* part;

    void expand(const Outputs& outputs, const Block& block) const { all->expand(*all, *part, outputs, block); }
};

template <typename Number>
WeighedRows weigh_rows(const Tokens& tokens, const Additions& additions);
