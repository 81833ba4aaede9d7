// What rank rows add to outputs, w B, in the processor's tile registers: to sums that are there already.
//
// A product takes what 16 tokens weigh 32 rank rows with, and pairs of these rows for 16 outputs, as their panels have
// them. Tokens that share the registers with others' rows meet them with zeros. Every sum is in the same order, whoever
// shares the registers: rank rows are finite, and none of them is zero times anything else.
#pragma once

#include "low_rank.h"
#include "rank_panels.h"
#include "tile_registers.h"

#ifdef HAS_TILE_REGISTERS

// A segment's rank rows as a block of 16 tokens meets them: `weighted` [16][width] lies so far behind the part's first,
// `width` a multiple of 32, with zeros where there is no row or another's token.
struct RankItem {
    Index weighted, width, row_start, extent;
};

// Those of block b are items [first[b], first[b + 1]).
struct RankItems {
    const RankItem* items;
    const Index* first;
    Index num_blocks;
};

// The rank rows of one module.
struct RankSums {
    const RankItems* items;
    const BFloat16* weighted;
    const BFloat16* rows;  // expand rows
    Index d_out;           // padded to whole panels

    static RankSums of(const WeighedRows& all, const WeighedPart& part) {
        return {all.items, reinterpret_cast<const BFloat16*>(part.weighted),
                static_cast<const BFloat16*>(part.part->expand_rows), (part.part->d_out + PANEL - 1) / PANEL * PANEL};
    }

    bool has_any(Index block) const {
        return items && block < items->num_blocks && items->first[block] < items->first[block + 1];
    }

    // Registers SUMS and the next ones, a panel each, += what the tokens of a block add to it. WEIGHTS takes as many
    // tokens as they do and ROWS pairs of rows; FEW_WEIGHTS and FEW_ROWS, if they are others, half as many rows.
    template <int SUMS, int WEIGHTS, int ROWS, int PANELS, int FEW_WEIGHTS = WEIGHTS, int FEW_ROWS = ROWS>
    void add(Index block, Index panel) const {
        if (!has_any(block)) return;
        for (Index i = items->first[block]; i < items->first[block + 1]; ++i) {
            const RankItem& item = items->items[i];
            for (Index row = 0; row < item.width; row += EXPAND_ROWS)
                FEW_ROWS != ROWS && rows_in_block(item.extent, row, EXPAND_ROWS) <= EXPAND_ROWS / 2
                    ? add_rows<SUMS, FEW_WEIGHTS, FEW_ROWS, PANELS>(item, row, panel)
                    : add_rows<SUMS, WEIGHTS, ROWS, PANELS>(item, row, panel);
        }
    }

    // A panel's pairs of the rows that begin with `row`, and how many numbers they are.
    const BFloat16* pairs(const RankItem& item, Index row, Index panel) const {
        return rows + (item.row_start + row) * d_out + panel * panel_size(item, row);
    }

    static Index panel_size(const RankItem& item, Index row) {
        return rows_in_block(item.extent, row, EXPAND_ROWS) * PANEL;
    }

private:
    template <int SUMS, int WEIGHTS, int ROWS, int PANELS>
    void add_rows(const RankItem& item, Index row, Index panel) const {
        load_tile<WEIGHTS>(weighted + item.weighted + row, item.width * sizeof(BFloat16));
        add_panels<SUMS, WEIGHTS, ROWS, PANELS>(pairs(item, row, panel), panel_size(item, row));
    }

    template <int SUMS, int WEIGHTS, int ROWS, int PANELS, int P = 0>
    static void add_panels(const BFloat16* pairs, Index panel_size) {
        if constexpr (P < PANELS) {
            load_tile<ROWS>(pairs + P * panel_size, TILE_BYTES);
            add_pair_products<SUMS + P, WEIGHTS, ROWS>();
            add_panels<SUMS, WEIGHTS, ROWS, PANELS, P + 1>(pairs, panel_size);
        }
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
            num_lines += std::min(item->width, item->extent) * PANEL * num_panels * sizeof(BFloat16) / TILE_BYTES;
        each_ = (num_lines + num_steps - 1) / num_steps;
        begin();
    }

    void ask() {
        for (Index i = 0; i < each_ && item_ < end_; ++i, line_ += TILE_BYTES) {
            __builtin_prefetch(line_, 0, 2);
            if (line_ + TILE_BYTES >= last_) next();
        }
    }

private:
    void next() {
        row_ += EXPAND_ROWS;
        if (row_ >= item_->width) row_ = 0, ++item_;
        if (item_ < end_) begin();
        line_ -= TILE_BYTES;
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
