// How segments are cut into pieces of work, for what their rank rows make of tokens.
#pragma once

#include "rank_rows.h"
#include "threads.h"

#include <algorithm>
#include <vector>

// Rectangles of tokens and rank rows: blocks of tokens by all of the rows or, where threads would go without, by blocks of
// them. Blocks of tokens begin with the same tokens of the batch in every segment.
class Cut {
public:
    static bool are_few(Index num_pieces) { return num_pieces < 2 * num_threads(); }

    static Index num_blocks(Index token_start, Index num_tokens) {
        return (token_start % TOKENS + num_tokens + TOKENS - 1) / TOKENS;
    }

    // For segments of so many blocks of tokens together.
    explicit Cut(Index num_blocks) : is_by_rows_(are_few(num_blocks)) {}

    Index num_pieces(Index token_start, Index num_tokens, Index num_rows) const {
        return num_blocks(token_start, num_tokens) * (is_by_rows_ ? (num_rows + ROWS - 1) / ROWS : 1);
    }

    Rectangle piece(Index token_start, Index num_tokens, Index num_rows, Index number) const {
        const Index count = num_blocks(token_start, num_tokens), row = number / count * ROWS;
        const Index block = (token_start / TOKENS + number % count) * TOKENS, begin = std::max(block, token_start);
        const Index end = std::min(block + TOKENS, token_start + num_tokens);
        return {begin, end - begin, row, std::min(is_by_rows_ ? ROWS : num_rows, num_rows - row)};
    }

private:
    static constexpr Index TOKENS = 64, ROWS = 32;
    bool is_by_rows_;
};

// `Rows` says how many numbers a segment's weighted rows take, and how many blocks of rank rows it likes to have at once
// of segments that lie in one block of tokens: with one segment at a time memory would wait for the processor.
template <typename Rows>
class RankPieces {
public:
    explicit RankPieces(const Additions& additions) : pieces_(room()) {
        const Segment *const first = additions.segments, *const end = first + additions.num_segments;
        Index num_blocks = 0;
        for (const Segment* s = first; s < end; ++s) num_blocks += Cut::num_blocks(s->token_start, s->num_tokens);
        const Cut cut(num_blocks);
        for (const Segment* s = first; s < end;) {
            const Segment* const neighbours = end_of_block(s, end);
            const Index most = most_together(s, neighbours);
            while (s < neighbours) {
                const Index count = num_together(s, neighbours, most);
                count > 1 ? add({s, count, {}, 0}) : add_rectangles(*s, cut);
                for (const Segment* last = s + count; s < last; ++s) weighted_ += Rows::weighted_size(*s);
            }
        }
    }

    Index size() const { return pieces_.size(); }
    const RankPiece& operator[](Index number) const { return pieces_[number]; }
    Index weighted_size() const { return weighted_; }  // of all segments

private:
    // The calling thread's, used again.
    static std::vector<RankPiece>& room() {
        static thread_local std::vector<RankPiece> pieces;
        pieces.clear();
        return pieces;
    }

    void add(RankPiece piece) {
        piece.weighted = weighted_;
        pieces_.push_back(piece);
    }

    void add_rectangles(const Segment& s, const Cut& cut) {
        for (Index i = 0; i < cut.num_pieces(s.token_start, s.num_tokens, s.num_rows); ++i)
            add({&s, 1, cut.piece(s.token_start, s.num_tokens, s.num_rows, i), 0});
    }

    // Behind the segments that lie in one block of tokens; behind the first if it needs several.
    static const Segment* end_of_block(const Segment* first, const Segment* end) {
        const Index block = first->token_start / Rows::BLOCK_TOKENS;
        const auto lies_in_it = [&](const Segment& s) {
            const Index last_token = s.token_start + s.num_tokens - 1;
            return s.token_start / Rows::BLOCK_TOKENS == block && last_token / Rows::BLOCK_TOKENS == block;
        };
        const Segment* s = first;
        while (s < end && lies_in_it(*s)) ++s;
        return std::max(s, first + 1);
    }

    static Index num_row_blocks(const Segment& s) { return (s.num_rows + ROW_BLOCK - 1) / ROW_BLOCK; }

    // As many blocks of rows for each thread, in turns of no more than `Rows` likes.
    static Index most_together(const Segment* s, const Segment* end) {
        Index num_blocks = 0;
        for (; s < end; ++s) num_blocks += num_row_blocks(*s);
        const Index threads = num_threads(), turn = Rows::ROW_BLOCKS_TOGETHER * threads;
        const Index num_shares = (num_blocks + turn - 1) / turn * threads;
        return (num_blocks + num_shares - 1) / num_shares;
    }

    static Index num_together(const Segment* first, const Segment* end, Index most) {
        const Segment* s = first;
        for (Index num_blocks = 0; s < end && (num_blocks += num_row_blocks(*s)) <= most;) ++s;
        return std::max<Index>(s - first, 1);
    }

    std::vector<RankPiece>& pieces_;
    Index weighted_ = 0;
};
