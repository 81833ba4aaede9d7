// Where the rank rows of a module lie that blocks of 16 tokens meet, and what the tokens weigh them with.
#pragma once

#include "dot.h"
#include "lines.h"
#include "low_rank.h"
#include "rank_panels.h"

#ifdef __AVX512BF16__

constexpr Index TOKENS_IN_BLOCK = 16;

// Tokens [token, + num_tokens) of the batch, of one block of 16, by the first num_rows of a resident's rows: `weighted`
// [16][width] of the block lies so far behind the part's first, `width` a multiple of 32.
struct RankItem {
    Index weighted, width, row_start, num_rows, extent, token, num_tokens;
};

// Those of block b are items [first[b], first[b + 1]).
struct RankItems {
    const RankItem* items;
    const Index* first;
    Index num_blocks;
};

struct RankSums {
    const RankItems* items;
    const BFloat16* weighted;
    const BFloat16* rows;  // expand rows
    Index d_out;           // padded to whole panels

    static RankSums of(const AddedRows& rows) {
        const LowRankPart& part = *rows.part->part;
        return {rows.all->items, reinterpret_cast<const BFloat16*>(rows.part->weighted),
                static_cast<const BFloat16*>(part.expand_rows), (part.d_out + PANEL - 1) / PANEL * PANEL};
    }

    bool has_any(Index block) const {
        return items && block < items->num_blocks && items->first[block] < items->first[block + 1];
    }

    // A panel's pairs of the rows that begin with `row`, and how many numbers they are.
    const BFloat16* pairs(const RankItem& item, Index row, Index panel) const {
        return rows + (item.row_start + row) * d_out + panel * panel_size(item, row);
    }

    static Index panel_size(const RankItem& item, Index row) {
        return rows_in_block(item.extent, row, EXPAND_ROWS) * PANEL;
    }
};

// Asks for the rank rows that a block of tokens adds to some panels, in as many steps as there are before.
class RankAhead {
public:
    RankAhead(const RankSums& sums, Index block, Index panel, Index num_panels, Index num_steps)
        : sums_(sums), panel_(panel), num_panels_(num_panels) {
        if (!sums.has_any(block)) return;
        item_ = sums.items->items + sums.items->first[block];
        end_ = sums.items->items + sums.items->first[block + 1];
        Index num_lines = 0;
        for (const RankItem* item = item_; item < end_; ++item)
            num_lines += std::min(item->width, item->extent) * PANEL * num_panels * sizeof(BFloat16) / LINE_BYTES;
        each_ = (num_lines + num_steps - 1) / num_steps;
        begin();
    }

    void ask() {
        for (Index i = 0; i < each_ && item_ < end_; ++i, line_ += LINE_BYTES) {
            __builtin_prefetch(line_, 0, 2);
            if (line_ + LINE_BYTES >= last_) next();
        }
    }

private:
    void next() {
        row_ += EXPAND_ROWS;
        if (row_ >= item_->width) row_ = 0, ++item_;
        if (item_ < end_) begin();
        line_ -= LINE_BYTES;
    }

    void begin() {
        line_ = reinterpret_cast<const char*>(sums_.pairs(*item_, row_, panel_));
        last_ = line_ + num_panels_ * RankSums::panel_size(*item_, row_) * sizeof(BFloat16);
    }

    const RankSums& sums_;
    Index panel_, num_panels_;
    const RankItem *item_ = nullptr, *end_ = nullptr;
    Index row_ = 0, each_ = 0;
    const char *line_ = nullptr, *last_ = nullptr;
};

#endif
