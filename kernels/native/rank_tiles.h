// Rank rows that meet tokens in the processor's tile registers.
#pragma once

#include "rank_weights.h"
#include "shrink_tiles.h"
#include "tile_sums.h"

#ifdef HAS_TILE_REGISTERS

class RankTiles : public RankWeights {
public:
    explicit RankTiles(const Tokens& tokens) : tokens_(tokens) {}

    static constexpr Index ROW_BLOCKS_TOGETHER = 4;

    // take(token, row, count, u): A x + a of a token with a block of the rank rows, both counted from the first.
    template <typename Take>
    void shrink(const ShrinkRows& all, const Rectangle& some, const Take& take) const {
        const auto block_of = [&](Index i) { return row_block(all, some.row + i * SHRINK_ROWS, tokens_.d_in); };
        const Index num_row_blocks = (some.num_rows + SHRINK_ROWS - 1) / SHRINK_ROWS;
        ShrinkTiles(tokens_, num_row_blocks, block_of).shrink(some.token, some.num_tokens, [&](Index token, Index i, const float* u) {
            take(token, i * SHRINK_ROWS, std::min(SHRINK_ROWS, some.num_rows - i * SHRINK_ROWS), u);
        });
    }

    // Writes c u of a piece, and exactly 0 where c is 0, whatever u is.
    void weigh(const RankPiece& piece, const LowRankPart& part, float* weighted) const {
        if (piece.num_segments > 1) return weigh_together(piece, part, weighted);
        const Segment& s = *piece.segment;
        const Rectangle& some = piece.some;
        clear(s, some, weighted);
        shrink(rows_of(s, part), some, [&](Index token, Index row, Index count, const float* u) {
            keep(s, some.token - s.token_start + token, some.row + row, count, u, weighted);
        });
    }

    // Before tokens of a segment are kept one by one: other tokens of its blocks meet zeros.
    static void clear(const Segment& segment, float* weighted) {
        clear(segment, {segment.token_start, segment.num_tokens, 0, segment.num_rows}, weighted);
    }

    // Adds a block, whose first token is the batch's, to the part's outputs.
    static void expand(const WeighedRows& all, const WeighedPart& part, const Outputs& outputs, const Block& block) {
        const TileSums sums{RankSums::of({&all, &part})};
        const Index end = block.column + block.num_columns;
        Index column = block.column;
        for (; column + 4 * PANEL <= end; column += 4 * PANEL) add_columns<4>(sums, outputs, block, column, 4 * PANEL);
        for (; column < end; column += PANEL) add_columns<1>(sums, outputs, block, column, std::min(PANEL, end - column));
        release_tiles();
    }

private:
    // Segments of one block of tokens: all of it meets the rows of each, which keeps what its own tokens make of them.
    void weigh_together(const RankPiece& piece, const LowRankPart& part, float* weighted) const {
        struct Place {
            const Segment* segment;
            Index row;
            float* weighted;
        } places[ROW_BLOCKS_TOGETHER];
        Index num_places = 0;
        for (const Segment* s = piece.segment; s < piece.segment + piece.num_segments; ++s) {
            clear(*s, weighted);
            for (Index row = 0; row < s->num_rows; row += SHRINK_ROWS) places[num_places++] = {s, row, weighted};
            weighted += weighted_size(*s);
        }
        const auto block_of = [&](Index i) { return row_block(rows_of(*places[i].segment, part), places[i].row, tokens_.d_in); };
        const Index first = piece.segment->token_start / TILE_ROWS * TILE_ROWS;
        const Index num_tokens = std::min<Index>(TILE_ROWS, tokens_.num_tokens - first);
        ShrinkTiles(tokens_, num_places, block_of).shrink(first, num_tokens, [&](Index token, Index i, const float* u) {
            const auto& [s, row, here] = places[i];
            const Index own = first + token - s->token_start;
            if (own >= 0 && own < s->num_tokens) keep(*s, own, row, std::min(SHRINK_ROWS, s->num_rows - row), u, here);
        });
    }

    // Zeroes what a rectangle has of them: all of its blocks of tokens, by its rows in whole lines.
    static void clear(const Segment& segment, const Rectangle& some, float* weighted) {
        const Index begin = some.token / TILE_ROWS * TILE_ROWS;
        const Index end = (some.token + some.num_tokens + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
        for (Index token = begin; token < end; ++token)
            std::memset(place(segment, token, some.row, weighted), 0, padded(some.num_rows) * sizeof(BFloat16));
    }

    template <int PANELS>
    static void add_columns(const TileSums& sums, const Outputs& outputs, const Block& block, Index column, Index count) {
        for (Index token = block.token; token < block.token + block.num_tokens; token += TILE_ROWS) {
            const Index num_tokens = std::min<Index>(TILE_ROWS, block.token + block.num_tokens - token);
            if (!sums.has_any(token / TILE_ROWS)) continue;
            shape_for_block(num_tokens);
            clear_tile<0>(), clear_tile<1>(), clear_tile<2>(), clear_tile<3>();
            sums.add<0, 4, 5, PANELS, 6, 7>(token / TILE_ROWS, column / PANEL);
            BFloat16* y = outputs.at<BFloat16>(token - block.token, column);
            add_sums<0, PANELS>(y, outputs.stride, num_tokens, count);
            add_sums<1, PANELS>(y, outputs.stride, num_tokens, count);
            add_sums<2, PANELS>(y, outputs.stride, num_tokens, count);
            add_sums<3, PANELS>(y, outputs.stride, num_tokens, count);
        }
    }

    template <int SUMS, int PANELS>
    static void add_sums(BFloat16* y, Index stride, Index num_tokens, Index count) {
        if constexpr (SUMS < PANELS) {
            alignas(64) float sums[TILE_ROWS][PANEL];
            store_tile<SUMS>(sums, sizeof sums[0]);
            const __mmask16 there = (1u << std::min(count - SUMS * PANEL, PANEL)) - 1;
            y += SUMS * PANEL;
            for (Index t = 0; t < num_tokens; ++t, y += stride) {
                const Lanes total = widen(_mm256_maskz_loadu_epi16(there, y)) + load_lanes(sums[t]);
                _mm256_mask_storeu_epi16(y, there, (__m256i)_mm512_cvtneps_pbh((__m512)total));
            }
        }
    }

    const Tokens& tokens_;
};

#endif
