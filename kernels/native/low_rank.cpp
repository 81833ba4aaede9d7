// The one equation: y_t += sum_j c_tj (A_j x_t + a_j) B_j over the rank rows j of the token's own segments.
//
// Modules that share an input (queries, keys and values; gate and up) are parts of one call. Every token meets its own
// rank rows only, so base tokens cost nothing and nobody pads to anybody's rank.

#include "low_rank.h"

#include "rank_rows.h"
#include "rank_tiles.h"
#include "threads.h"

#include <algorithm>
#include <vector>

// Some tokens by some rank rows, both counted from the first of a segment.
struct Rectangle {
    Index token, num_tokens, row, num_rows;
};

// Rectangles of a block of tokens by all rank rows; of a block of rank rows for a token alone, so that threads can share it.
static Index num_rectangles(Index num_tokens, Index num_rows) {
    return num_tokens == 1 ? (num_rows + ROW_BLOCK - 1) / ROW_BLOCK : (num_tokens + TOKEN_BLOCK - 1) / TOKEN_BLOCK;
}

static Rectangle rectangle(Index num_tokens, Index num_rows, Index number) {
    if (num_tokens == 1) return {0, 1, number * ROW_BLOCK, std::min(ROW_BLOCK, num_rows - number * ROW_BLOCK)};
    return {number * TOKEN_BLOCK, std::min(TOKEN_BLOCK, num_tokens - number * TOKEN_BLOCK), 0, num_rows};
}

// A module's rank rows from `row_start`, and the tokens from `token_start` that meet them.
struct Shrink {
    const void* rows;
    const void* bias;  // or null
    Index token_start, row_start;
};

// take(token, row, count, u): A x + a of a token of the rectangle with a block of its rank rows.
template <typename Number, typename Rows, typename Take>
static void shrink_rectangle(const Rows& rank_rows, const Shrink& shrink, const Rectangle& part, const Take& take) {
    const auto turned = rank_rows.turn(shrink.token_start + part.token, part.num_tokens);
    for (Index row = part.row; row < part.row + part.num_rows; row += ROW_BLOCK) {
        const Index count = std::min(ROW_BLOCK, part.row + part.num_rows - row), first = shrink.row_start + row;
        BlockProducts u;
        rank_rows.shrink(turned, shrink.rows, part.num_tokens, first, count, u);
        for (Index t = 0; t < part.num_tokens; ++t) {
            if (shrink.bias)
                for (Index r = 0; r < count; ++r) u[t][r] += to_float(static_cast<const Number*>(shrink.bias)[first + r]);
            take(part.token + t, row, count, u[t]);
        }
    }
}

// Keeps c (A x + a) of a part of the segment, and exactly 0 where c is 0, whatever x is.
template <typename Number, typename Rows>
static void shrink_segment(const Rows& rank_rows, const LowRankPart& part, const Segment& segment, Index number,
                           float* weighted) {
    const auto weigh = [&](Index token, Index row, Index count, float* u) {
        const float* coefficients = segment.coefficients + token * segment.coefficient_stride + row;
        for (Index r = 0; r < count; ++r) u[r] = coefficients[r] == 0.0f ? 0.0f : coefficients[r] * u[r];
        Rows::keep(segment, token, row, count, u, weighted);
    };
    shrink_rectangle<Number>(rank_rows, {part.shrink_rows, part.shrink_bias, segment.token_start, segment.row_start},
                             rectangle(segment.num_tokens, segment.num_rows, number), weigh);
}

// Numbers that one part's weighed rows take.
template <typename Rows>
static Index weighted_size(const Additions& additions) {
    Index size = 0;
    for (Index s = 0; s < additions.num_segments; ++s) size += Rows::weighted_size(additions.segments[s]);
    return size;
}

// The rows of an addition's parts, one behind the other.
template <typename Number, typename Rows>
static void shrink_parts(const Rows& rank_rows, const Addition& addition, const Additions& additions, float* all_weighted) {
    const Index size = weighted_size<Rows>(additions);
    Index shrinks = 0;
    for (Index s = 0; s < additions.num_segments; ++s)
        shrinks += num_rectangles(additions.segments[s].num_tokens, additions.segments[s].num_rows);
    parallel(shrinks * addition.num_parts, [&](Index item) {
        const Index p = item / shrinks;
        Index number = item % shrinks;
        float* weighted = all_weighted + p * size;
        const Segment* segment = additions.segments;
        for (Index count; number >= (count = num_rectangles(segment->num_tokens, segment->num_rows)); ++segment) {
            number -= count;
            weighted += Rows::weighted_size(*segment);
        }
        shrink_segment<Number>(rank_rows, addition.parts[p], *segment, number, weighted);
    });
}

template <typename Rows>
static void expand_part(const WeighedRows& rows, Index place, const Outputs& outputs, Index column, Index count) {
    const Additions& all = rows.additions;
    const float* weighted = rows.weighted;
    for (Index i = 0; i < all.num_additions; ++i)
        for (Index p = 0; p < all.additions[i].num_parts; ++p)
            for (Index s = 0; s < all.num_segments; weighted += Rows::weighted_size(all.segments[s++]))
                if (all.additions[i].parts[p].place == place)
                    Rows::expand(all.additions[i].parts[p], outputs, all.segments[s], column, count, weighted);
}

// Softmax of the allowed scores, in place; 0 for the others, and for all where none is allowed.
static void softmax_allowed(float* scores, Index count, const uint8_t* allowed, Index num_members) {
    const auto is_allowed = [&](Index i) { return !allowed || i >= num_members || allowed[i]; };
    float maximum = -INFINITY, total = 0;
    for (Index i = 0; i < count; ++i)
        if (is_allowed(i)) maximum = scores[i] > maximum || scores[i] != scores[i] ? scores[i] : maximum;
    for (Index i = 0; i < count; ++i) {
        scores[i] = is_allowed(i) ? std::exp(scores[i] - maximum) : 0.0f;
        total += scores[i];
    }
    for (Index i = 0; i < count; ++i)
        if (is_allowed(i)) scores[i] /= total;
}

// score_i = sum over the rows j of member i of u_j g_j, + n_i x with member keys; the base member's score is 0.
static void weigh_members(const FusionAttention& fusion, Index token, const float* u) {
    const Index count = fusion.num_members + fusion.has_base_member;
    float* weights = fusion.weights + token * count;
    const float* scores = u + fusion.num_rows;
    std::fill(weights, weights + count, 0.0f);
    for (Index r = 0; r < fusion.num_rows; ++r) weights[fusion.member_of_row[r]] += u[r] * scores[r];
    if (fusion.has_member_keys)
        for (Index i = 0; i < fusion.num_members; ++i) weights[i] += scores[fusion.num_rows + i];
    const uint8_t* allowed = fusion.allowed ? fusion.allowed + token * fusion.allowed_stride : nullptr;
    softmax_allowed(weights, count, allowed, fusion.num_members);
    for (Index r = 0; r < fusion.num_rows; ++r)
        fusion.coefficients[token * fusion.num_rows + r] = weights[fusion.member_of_row[r]];
}

template <typename Number, typename Rows>
static void attend_members(const Rows& rank_rows, const FusionAttention& fusion) {
    const Index num_rows = 2 * fusion.num_rows + (fusion.has_member_keys ? fusion.num_members : 0);
    static thread_local std::vector<float> workspace;  // of the calling thread, used by all
    workspace.resize(std::max<size_t>(workspace.size(), fusion.num_tokens * num_rows));
    float* const u = workspace.data();
    const Shrink shrink{fusion.shrink_rows, fusion.shrink_bias, fusion.token_start, fusion.row_start};
    parallel(num_rectangles(fusion.num_tokens, num_rows), [&](Index number) {
        shrink_rectangle<Number>(rank_rows, shrink, rectangle(fusion.num_tokens, num_rows, number),
                                 [&](Index token, Index row, Index count, const float* products) {
                                     std::copy(products, products + count, u + token * num_rows + row);
                                 });
    });
    parallel_ranges(fusion.num_tokens, fusion.num_tokens * num_rows * 4, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) weigh_members(fusion, token, u + token * num_rows);
    });
}

template <typename Number, typename Rows>
static WeighedRows weigh_all(const Tokens& tokens, const Additions& additions) {
    static thread_local std::vector<float> workspace;  // of the calling thread, used by all
    const Index size = weighted_size<Rows>(additions);
    Index num_parts = 0;
    for (Index i = 0; i < additions.num_additions; ++i) num_parts += additions.additions[i].num_parts;
    workspace.resize(std::max<size_t>(workspace.size(), num_parts * size));
    const Rows rank_rows(tokens);
    float* weighted = workspace.data();
    for (Index i = 0; i < additions.num_additions; ++i) {
        const Addition& addition = additions.additions[i];
        for (Index f = 0; f < addition.num_attentions; ++f) attend_members<Number>(rank_rows, addition.attentions[f]);
        shrink_parts<Number>(rank_rows, addition, additions, weighted);
        weighted += addition.num_parts * size;
    }
    return {additions, workspace.data(), expand_part<Rows>};
}

template <>
WeighedRows weigh_rows<float>(const Tokens& tokens, const Additions& additions) {
    return weigh_all<float, RankRows<float>>(tokens, additions);
}

template <>
WeighedRows weigh_rows<BFloat16>(const Tokens& tokens, const Additions& additions) {
#ifdef HAS_TILE_REGISTERS
    if (RankTiles::takes(tokens)) return weigh_all<BFloat16, RankTiles>(tokens, additions);
#endif
    return weigh_all<BFloat16, RankRows<BFloat16>>(tokens, additions);
}

static Index num_column_blocks(const LowRankPart& part) { return (part.d_out + COLUMN_BLOCK - 1) / COLUMN_BLOCK; }

// To outputs that are all there.
template <typename Number>
static void add_low_rank(const Tokens& tokens, void* const* outputs, const Additions& additions) {
    if (additions.num_segments == 0) return;
    const WeighedRows rows = weigh_rows<Number>(tokens, additions);
    for (Index i = 0; i < additions.num_additions; ++i) {
        const Addition& addition = additions.additions[i];
        Index num_blocks = 0;
        for (Index p = 0; p < addition.num_parts; ++p) num_blocks += num_column_blocks(addition.parts[p]);
        parallel(num_blocks, [&](Index block) {
            const LowRankPart* part = addition.parts;
            while (block >= num_column_blocks(*part)) block -= num_column_blocks(*part++);
            const Index column = block * COLUMN_BLOCK, count = std::min(COLUMN_BLOCK, part->d_out - column);
            rows.expand(rows, part->place, {outputs[part->place], part->d_out}, column, count);
        });
    }
}

extern "C" {
void add_low_rank_f32(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<float>(*tokens, outputs, *additions);
}
void add_low_rank_bf16(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<BFloat16>(*tokens, outputs, *additions);
}
}
