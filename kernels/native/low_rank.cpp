// The one equation: y_t += sum_j c_tj (A_j x_t + a_j) B_j over the rank rows j of the token's own segments.
//
// Modules that share an input (queries, keys and values; gate and up) are parts of one call. Every token meets its own
// rank rows only, so base tokens cost nothing and nobody pads to anybody's rank.

#include "low_rank.h"

#include "cut.h"
#include "lines.h"
#include "rank_pairs.h"
#include "rank_rows.h"
#include "rank_tiles.h"
#include "threads.h"

#include <algorithm>
#include <vector>

// True if a segment's tokens are a fusion's.
static bool is_of(const Segment& segment, const FusionAttention& fusion) {
    return segment.token_start == fusion.token_start && segment.row_start == fusion.row_start;
}

// True if an attention has kept what a piece makes of an addition's first part, which is the module it is of.
static bool is_kept(const RankPiece& piece, const Addition& addition) {
    const FusionAttention *const first = addition.attentions, *const end = first + addition.num_attentions;
    return piece.num_segments == 1 && std::any_of(first, end, [&](const auto& f) { return is_of(*piece.segment, f); });
}

// The rows of an addition's parts, one behind the other.
template <typename Rows>
static void shrink_parts(const Rows& rank_rows, const Addition& addition, const RankPieces<Rows>& pieces, float* weighted) {
    const Index together = Cut::are_few(pieces.size()) ? 1 : addition.num_parts;
    parallel(pieces.size() * (addition.num_parts / together), [&](Index item) {
        const RankPiece& piece = pieces[item % pieces.size()];
        const Index first = item / pieces.size() * together;
        for (Index p = first; p < first + together; ++p)
            if (p > 0 || !is_kept(piece, addition))
                rank_rows.weigh(piece, addition.parts[p], weighted + p * pieces.weighted_size() + piece.weighted);
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

// Sets the coefficients of a fusion's segment and keeps what its tokens weigh the rows of the attention's module with: what
// the rows make of them is known.
template <typename Rows>
static void attend_members(const Rows& rank_rows, const FusionAttention& fusion, const Segment& segment, float* weighted) {
    const Index num_rows = 2 * fusion.num_rows + (fusion.has_member_keys ? fusion.num_members : 0);
    static thread_local std::vector<float> workspace;  // of the calling thread, used by all
    workspace.resize(std::max<size_t>(workspace.size(), fusion.num_tokens * num_rows + ROW_BLOCK));  // rows are read in blocks
    float* const u = workspace.data();
    const Cut cut(Cut::num_blocks(fusion.token_start, fusion.num_tokens));
    const ShrinkRows all{fusion.shrink_rows, fusion.shrink_bias, fusion.row_start, fusion.extent};
    parallel(cut.num_pieces(fusion.token_start, fusion.num_tokens, num_rows), [&](Index number) {
        const Rectangle some = cut.piece(fusion.token_start, fusion.num_tokens, num_rows, number);
        float* const first = u + (some.token - fusion.token_start) * num_rows + some.row;
        rank_rows.shrink(all, some, [&](Index token, Index row, Index count, const float* products) {
            std::copy(products, products + count, first + token * num_rows + row);
        });
    });
    Rows::clear(segment, weighted);
    parallel_ranges(fusion.num_tokens, fusion.num_tokens * num_rows * 4, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) {
            const float* const products = u + token * num_rows;
            weigh_members(fusion, token, products);
            for (Index row = 0; row < fusion.num_rows; row += ROW_BLOCK)
                Rows::keep(segment, token, row, std::min(ROW_BLOCK, fusion.num_rows - row), products + row, weighted);
        }
    });
}

template <typename Rows>
static WeighedRows weigh_all(const Tokens& tokens, const Additions& additions) {
    static thread_local Lines<float> workspace;  // of the calling thread, used by all
    static thread_local std::vector<WeighedPart> parts;
    const RankPieces<Rows> pieces(additions);
    const Index size = pieces.weighted_size();
    parts.clear();
    for (Index i = 0; i < additions.num_additions; ++i)
        for (Index p = 0; p < additions.additions[i].num_parts; ++p)
            parts.push_back({&additions.additions[i].parts[p], nullptr});
    const Index num_parts = parts.size();
    float* weighted = workspace.make_room(num_parts * size);
    for (WeighedPart& part : parts) part.weighted = weighted, weighted += size;
    weighted = workspace.data();
    const Rows rank_rows(tokens);
    for (Index i = 0; i < additions.num_additions; ++i) {
        const Addition& addition = additions.additions[i];
        for (Index f = 0; f < addition.num_attentions; ++f) {
            const Segment* segment = additions.segments;
            float* place = weighted;
            for (; !is_of(*segment, addition.attentions[f]); ++segment) place += Rows::weighted_size(*segment);
            attend_members(rank_rows, addition.attentions[f], *segment, place);
        }
        shrink_parts(rank_rows, addition, pieces, weighted);
        weighted += addition.num_parts * size;
    }
    return {additions, parts.data(), num_parts, Rows::items(additions), Rows::expand};
}

template <>
WeighedRows weigh_rows<float>(const Tokens& tokens, const Additions& additions) {
    return weigh_all<RankRows<float>>(tokens, additions);
}

template <>
WeighedRows weigh_rows<Float16>(const Tokens& tokens, const Additions& additions) {
    return weigh_all<RankRows<Float16>>(tokens, additions);
}

template <>
WeighedRows weigh_rows<BFloat16>(const Tokens& tokens, const Additions& additions) {
#ifdef HAS_TILE_REGISTERS
    if (tiles_take(tokens.d_in)) return weigh_all<RankTiles>(tokens, additions);
#endif
#ifdef __AVX512BF16__
    if (has_panels(tokens.d_in)) return weigh_all<RankPairs>(tokens, additions);
#endif
    return weigh_all<RankRows<BFloat16>>(tokens, additions);
}

static Index num_column_blocks(const LowRankPart& part) { return (part.d_out + COLUMN_BLOCK - 1) / COLUMN_BLOCK; }

// To outputs that are all there.
template <typename Number>
static void add_low_rank(const Tokens& tokens, void* const* outputs, const Additions& additions) {
    if (additions.num_segments == 0) return;
    const WeighedRows rows = weigh_rows<Number>(tokens, additions);
    const WeighedPart* weighed = rows.parts;
    for (Index i = 0; i < additions.num_additions; ++i) {
        const Addition& addition = additions.additions[i];
        Index num_blocks = 0;
        for (Index p = 0; p < addition.num_parts; ++p) num_blocks += num_column_blocks(addition.parts[p]);
        parallel(num_blocks, [&](Index block) {
            const WeighedPart* some = weighed;
            while (block >= num_column_blocks(*some->part)) block -= num_column_blocks(*some++->part);
            const LowRankPart& part = *some->part;
            const Index column = block * COLUMN_BLOCK, count = std::min(COLUMN_BLOCK, part.d_out - column);
            rows.expand(rows, *some, {outputs[part.place], part.d_out}, {0, tokens.num_tokens, column, count});
        });
        weighed += addition.num_parts;
    }
}

extern "C" {
void add_low_rank_f32(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<float>(*tokens, outputs, *additions);
}
void add_low_rank_bf16(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<BFloat16>(*tokens, outputs, *additions);
}
void add_low_rank_f16(const Tokens* tokens, void* const* outputs, const Additions* additions) {
    add_low_rank<Float16>(*tokens, outputs, *additions);
}
}
