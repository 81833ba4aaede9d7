// Lays out a resident's rank rows as `rank_panels.h` says.

#include "rank_panels.h"

// True if modules with so many inputs have rank rows in panels, for products in bfloat16.
extern "C" int has_rank_panels(Index d_in) { return has_panels(d_in); }

extern "C" Index num_spare_rank_numbers() { return SPARE_NUMBERS; }

// rows [extent, d_in] -> panels.
extern "C" void pack_shrink_rows(const uint32_t* rows, Index extent, Index d_in, uint32_t* panels) {
    const Index num_pairs = d_in / 2;
    for (Index first = 0; first < extent; first += SHRINK_ROWS) {
        const Index count = rows_in_block(extent, first, SHRINK_ROWS);
        for (Index pair = 0; pair < num_pairs; ++pair)
            for (Index row = 0; row < count; ++row) *panels++ = rows[(first + row) * num_pairs + pair];
    }
}

// rows [extent, d_out] -> panels; extent is even.
extern "C" void pack_expand_rows(const uint16_t* rows, Index extent, Index d_out, uint16_t* panels) {
    for (Index first = 0; first < extent; first += EXPAND_ROWS) {
        const Index count = rows_in_block(extent, first, EXPAND_ROWS);
        for (Index column = 0; column < d_out; column += PANEL)
            for (Index row = first; row < first + count; row += 2, panels += 2 * PANEL)
                for (Index i = 0; i < PANEL; ++i) {
                    panels[2 * i] = rows[row * d_out + column + i];
                    panels[2 * i + 1] = rows[(row + 1) * d_out + column + i];
                }
    }
}
