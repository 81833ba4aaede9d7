// What rank rows add to outputs, w B, in the processor's tile registers: to sums that are there already.
//
// A product takes what 16 tokens weigh 32 rank rows with, and pairs of these rows for 16 outputs, as their panels have
// them. Tokens that share the registers with others' rows meet them with zeros. Every sum is in the same order, whoever
// shares the registers: rank rows are finite, and none of them is zero times anything else.
#pragma once

#include "rank_sums.h"
#include "tile_registers.h"

#ifdef HAS_TILE_REGISTERS

struct TileSums : RankSums {
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

#endif
