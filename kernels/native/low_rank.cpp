// The one equation: y_t += sum_j c_tj (A_j x_t + a_j) B_j over the rank rows j of the token's own segments.
//
// Modules that share an input (queries, keys and values; gate and up) are parts of one call. Every token meets its own
// rank rows only, so base tokens cost nothing and nobody pads to anybody's rank.

#include "low_rank.h"

#include "dot.h"
#include "lanes.h"
#include "threads.h"

#include <algorithm>
#include <vector>

constexpr Index ROW_BLOCK = 16;      // rank rows that read an input together
constexpr Index COLUMN_BLOCK = 128;  // outputs that are one piece of work

constexpr Index ROWS_AHEAD = 8;      // that are asked for early: they lie too far apart for the processor to guess

static Index num_row_blocks(const Segment& segment) { return (segment.num_rows + ROW_BLOCK - 1) / ROW_BLOCK; }

// u[r] = A_r x + a_r for `count` (at most ROW_BLOCK) rank rows from `row`.
template <typename Number>
static inline void shrink_block(const Tokens& tokens, const void* all_rows, const void* all_bias, Index token, Index row,
                                Index count, float* u) {
    const Number* x = static_cast<const Number*>(tokens.x) + token * tokens.x_stride;
    const Number* rows = static_cast<const Number*>(all_rows) + row * tokens.d_in;
    const Number* bias = static_cast<const Number*>(all_bias);
    if (count == ROW_BLOCK)
        dot_rows<ROW_BLOCK>(x, rows, tokens.d_in, tokens.d_in, u);
    else
        for (Index r = 0; r < count; ++r) dot_rows<1>(x, rows + r * tokens.d_in, tokens.d_in, tokens.d_in, u + r);
    if (bias)
        for (Index r = 0; r < count; ++r) u[r] += to_float(bias[row + r]);
}

// weighted [num_tokens, num_rows] of the segment: c (A x + a), and exactly 0 where c is 0, whatever x is.
template <typename Number>
static void shrink_segment(const Tokens& tokens, const LowRankPart& part, const Segment& segment, Index block,
                           float* weighted) {
    const Index first = block * ROW_BLOCK, count = std::min(ROW_BLOCK, segment.num_rows - first);
    for (Index token = 0; token < segment.num_tokens; ++token) {
        float u[ROW_BLOCK];
        shrink_block<Number>(tokens, part.shrink_rows, part.shrink_bias, segment.token_start + token,
                             segment.row_start + first, count, u);
        const float* coefficients = segment.coefficients + token * segment.coefficient_stride + first;
        float* result = weighted + token * segment.num_rows + first;
        for (Index r = 0; r < count; ++r) result[r] = coefficients[r] == 0.0f ? 0.0f : coefficients[r] * u[r];
    }
}

// y[token, columns] += sum_r weighted[token, r] B[r, columns] for TOKENS tokens and NUM_LANES * LANES columns.
template <int TOKENS, int NUM_LANES, typename Number>
static inline void expand_block(const float* weighted, Index num_rows, const Number* rows, Index d_out, Number* y,
                                Index y_stride) {
    Lanes sums[TOKENS][NUM_LANES];
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < NUM_LANES; ++i) sums[t][i] = load_lanes(y + t * y_stride + i * LANES);
    for (Index r = 0; r < num_rows; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < NUM_LANES; ++i) {
            if (i % 2 == 0) __builtin_prefetch(rows + (r + ROWS_AHEAD) * d_out + i * LANES);
            const Lanes row = load_lanes(rows + r * d_out + i * LANES);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) sums[t][i] += row * weighted[t * num_rows + r];
        }
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 8
        for (int i = 0; i < NUM_LANES; ++i) store_lanes(sums[t][i], y + t * y_stride + i * LANES);
}

// The columns [column, + count) of one token, where they do not fill registers.
template <typename Number>
static inline void expand_rest(const float* weighted, Index num_rows, const Number* rows, Index d_out, Number* y,
                               Index count) {
    for (Index i = 0; i < count; ++i) {
        float sum = to_float(y[i]);
        for (Index r = 0; r < num_rows; ++r) sum += weighted[r] * to_float(rows[r * d_out + i]);
        y[i] = from_float<Number>(sum);
    }
}

template <int TOKENS, typename Number>
static inline void expand_tokens(const float* weighted, Index num_rows, const Number* rows, Index d_out, Number* y,
                                 Index y_stride, Index count) {
    constexpr int NUM_LANES = TOKENS == 1 ? 8 : 4;
    Index column = 0;
    for (; column + NUM_LANES * LANES <= count; column += NUM_LANES * LANES)
        expand_block<TOKENS, NUM_LANES>(weighted, num_rows, rows + column, d_out, y + column, y_stride);
    for (; column + LANES <= count; column += LANES)
        expand_block<TOKENS, 1>(weighted, num_rows, rows + column, d_out, y + column, y_stride);
    for (int t = 0; t < TOKENS; ++t)
        expand_rest(weighted + t * num_rows, num_rows, rows + column, d_out, y + t * y_stride + column, count - column);
}

// Columns [column, + COLUMN_BLOCK) of the part, or what is left of them, for a segment's tokens.
template <typename Number>
static void expand_columns(const LowRankPart& part, void* output, const Segment& segment, Index column,
                           const float* weighted) {
    const Number* rows = static_cast<const Number*>(part.expand_rows) + segment.row_start * part.d_out + column;
    const Index count = std::min(COLUMN_BLOCK, part.d_out - column), num_rows = segment.num_rows;
    Number* y = static_cast<Number*>(output) + segment.token_start * part.d_out + column;
    Index token = 0;
    for (; token + 4 <= segment.num_tokens; token += 4)
        expand_tokens<4>(weighted + token * num_rows, num_rows, rows, part.d_out, y + token * part.d_out,
                         part.d_out, count);
    for (; token + 2 <= segment.num_tokens; token += 2)
        expand_tokens<2>(weighted + token * num_rows, num_rows, rows, part.d_out, y + token * part.d_out,
                         part.d_out, count);
    for (; token < segment.num_tokens; ++token)
        expand_tokens<1>(weighted + token * num_rows, num_rows, rows, part.d_out, y + token * part.d_out,
                         part.d_out, count);
}

static Index num_column_blocks(const LowRankPart& part) { return (part.d_out + COLUMN_BLOCK - 1) / COLUMN_BLOCK; }

template <typename Number>
static void add_parts(const Tokens& tokens, void* const* outputs, const Addition& addition, const Segment* segments,
                      Index num_segments) {
    const LowRankPart* parts = addition.parts;
    Index num_weighted = 0, shrinks = 0, expands = 0;
    for (Index s = 0; s < num_segments; ++s) {
        num_weighted += segments[s].num_tokens * segments[s].num_rows;
        shrinks += num_row_blocks(segments[s]);
    }
    for (Index p = 0; p < addition.num_parts; ++p) expands += num_column_blocks(parts[p]);
    static thread_local std::vector<float> workspace;  // of the calling thread, used by all
    workspace.resize(std::max<size_t>(workspace.size(), addition.num_parts * num_weighted));
    float* const all_weighted = workspace.data();
    parallel(shrinks * addition.num_parts, [&](Index item) {
        const Index p = item / shrinks;
        Index block = item % shrinks;
        float* weighted = all_weighted + p * num_weighted;
        const Segment* segment = segments;
        for (; block >= num_row_blocks(*segment); ++segment) {
            block -= num_row_blocks(*segment);
            weighted += segment->num_tokens * segment->num_rows;
        }
        shrink_segment<Number>(tokens, parts[p], *segment, block, weighted);
    });
    parallel(expands, [&](Index block) {
        Index p = 0;
        while (block >= num_column_blocks(parts[p])) block -= num_column_blocks(parts[p++]);
        const float* weighted = all_weighted + p * num_weighted;
        for (const Segment* segment = segments; segment < segments + num_segments; ++segment) {
            expand_columns<Number>(parts[p], outputs[parts[p].place], *segment, block * COLUMN_BLOCK, weighted);
            weighted += segment->num_tokens * segment->num_rows;
        }
    });
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

template <typename Number>
static void attend_members(const Tokens& tokens, const FusionAttention& fusion) {
    const Index num_rows = 2 * fusion.num_rows + (fusion.has_member_keys ? fusion.num_members : 0);
    const Index num_blocks = (num_rows + ROW_BLOCK - 1) / ROW_BLOCK;
    static thread_local std::vector<float> workspace;  // of the calling thread, used by all
    workspace.resize(std::max<size_t>(workspace.size(), fusion.num_tokens * num_rows));
    float* const u = workspace.data();
    parallel(num_blocks, [&](Index block) {
        const Index first = block * ROW_BLOCK, count = std::min(ROW_BLOCK, num_rows - first);
        for (Index token = 0; token < fusion.num_tokens; ++token)
            shrink_block<Number>(tokens, fusion.shrink_rows, fusion.shrink_bias, fusion.token_start + token,
                                 fusion.row_start + first, count, u + token * num_rows + first);
    });
    parallel_ranges(fusion.num_tokens, fusion.num_tokens * num_rows * 4, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) weigh_members(fusion, token, u + token * num_rows);
    });
}

template <typename Number>
void add_low_rank(const Tokens& tokens, void* const* outputs, const Additions& additions) {
    for (Index i = 0; i < additions.num_additions; ++i) {
        const Addition& addition = additions.additions[i];
        for (Index f = 0; f < addition.num_attentions; ++f) attend_members<Number>(tokens, addition.attentions[f]);
        add_parts<Number>(tokens, outputs, addition, additions.segments, additions.num_segments);
    }
}

template void add_low_rank<float>(const Tokens&, void* const*, const Additions&);
template void add_low_rank<BFloat16>(const Tokens&, void* const*, const Additions&);

extern "C" {
void add_low_rank_f32(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<float>(*tokens, outputs, *additions);
}
void add_low_rank_bf16(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<BFloat16>(*tokens, outputs, *additions);
}
}
