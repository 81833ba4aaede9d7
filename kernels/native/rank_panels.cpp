// Lays out a resident's rank rows as `rank_panels.h` says.

#include "rank_panels.h"
#include "threads.h"

// True if modules with so many inputs have rank rows in panels, for products in bfloat16.
extern "C" int has_rank_panels(Index d_in) { return has_panels(d_in); }

extern "C" Index num_spare_rank_numbers() { return SPARE_NUMBERS; }

// A resident's rows in one module, shrink [num_rows, d_in] and expand [num_rows, d_out], both null if it has none there,
// and where they go. As in Python.
struct PlainRows {
    const uint32_t* shrink;  // pairs of numbers
    const uint16_t* expand;
    uint32_t* shrink_panels;
    uint16_t* expand_panels;
    Index num_rows, d_in, d_out;
};

static void pack_shrink(const PlainRows& rows) {
    const Index num_pairs = rows.d_in / 2;
    uint32_t* panels = rows.shrink_panels;
    if (rows.shrink == nullptr) return void(std::fill_n(panels, rows.num_rows * num_pairs, 0));
    for (Index first = 0; first < rows.num_rows; first += SHRINK_ROWS) {
        const Index count = rows_in_block(rows.num_rows, first, SHRINK_ROWS);
        const uint32_t* block = rows.shrink + first * num_pairs;
        for (Index pair = 0; pair < num_pairs; ++pair)
            for (Index row = 0; row < count; ++row) *panels++ = block[row * num_pairs + pair];
    }
}

// The number of rows is even.
static void pack_expand(const PlainRows& rows) {
    const Index d_out = rows.d_out, num_panels = (d_out + PANEL - 1) / PANEL;
    uint16_t* panels = rows.expand_panels;
    if (rows.expand == nullptr) return void(std::fill_n(panels, rows.num_rows * num_panels * PANEL, 0));
    for (Index first = 0; first < rows.num_rows; first += EXPAND_ROWS) {
        const Index count = rows_in_block(rows.num_rows, first, EXPAND_ROWS);
        for (Index column = 0; column < d_out; column += PANEL) {
            const Index width = std::min(PANEL, d_out - column);
            for (Index row = first; row < first + count; row += 2, panels += 2 * PANEL) {
                const uint16_t *const even = rows.expand + row * d_out + column, *const odd = even + d_out;
                for (Index i = 0; i < width; ++i) panels[2 * i] = even[i], panels[2 * i + 1] = odd[i];
                std::fill(panels + 2 * width, panels + 2 * PANEL, 0);
            }
        }
    }
}

extern "C" void pack_rank_rows(const PlainRows* modules, Index count) {
    parallel(2 * count, [&](Index piece) {
        piece % 2 == 0 ? pack_shrink(modules[piece / 2]) : pack_expand(modules[piece / 2]);
    });
}
