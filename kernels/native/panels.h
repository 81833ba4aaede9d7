// How a product y = x W^T is cut into tiles: a few tokens by three panels of 16 outputs.
//
// Each output is summed over the inputs in order, so it does not depend on how many tokens there are.
#pragma once

#include "lanes.h"
#include "threads.h"

#include <algorithm>

constexpr Index PANEL = 16;         // outputs
constexpr Index MOST_IN_A_ROW = 8;  // tiles that one thread takes at once
constexpr Index PREFETCH_BYTES = 4096;

// With 16 registers of 8 numbers, a tile of several tokens has one panel.
#ifdef __AVX512F__
constexpr bool HAS_MANY_REGISTERS = true;
#else
constexpr bool HAS_MANY_REGISTERS = false;
#endif

// One of the modules that share an input. y: [num_tokens, d_out]; add: y += instead of y =.
struct LinearPart {
    const void* weights;  // in panels
    const void* scales;   // of quantized weights
    const void* bias;     // [d_out] or null
    void* y;
    Index d_out;
    Index add;
};

template <int PANELS, typename Product>
static void all_tokens(const Product& product, const LinearPart& part, Index panel) {
    constexpr int MOST = Product::MOST_TOKENS;
    Index token = 0;
    for (; token + MOST <= product.num_tokens; token += MOST) product.template tile<MOST, PANELS>(part, token, panel);
    if constexpr (MOST > 4)
        for (; token + 4 <= product.num_tokens; token += 4) product.template tile<4, PANELS>(part, token, panel);
    for (; token < product.num_tokens; ++token) product.template tile<1, PANELS>(part, token, panel);
}

// A product that meets a few tokens at a time with a few panels; `Product` has MOST_TOKENS, num_tokens and
// tile<TOKENS, PANELS>(part, token, panel).
template <typename Product>
static void few_by_few(const Product& product, const LinearPart& part, Index first, Index count) {
    if (!HAS_MANY_REGISTERS && product.num_tokens > 1) {
        for (Index panel = first; panel < first + count; ++panel) all_tokens<1>(product, part, panel);
        return;
    }
    if (count == 3) return all_tokens<3>(product, part, first);
    if (count == 2) return all_tokens<2>(product, part, first);
    all_tokens<1>(product, part, first);
}

// Stores 16 sums as outputs of a token, with the bias, onto what is there if the part says so; rounded once.
template <typename Number>
static inline void finish(Lanes sums, const LinearPart& part, Index token, Index output) {
    Number* y = static_cast<Number*>(part.y) + token * part.d_out + output;
    if (part.bias) sums += load_lanes(static_cast<const Number*>(part.bias) + output);
    if (part.add) sums += load_lanes(y);
    store_lanes(sums, y);
}

// What is done to columns [column, + count) of a part as soon as they are there, by the thread that has computed them.
struct AfterColumns {
    void (*run)(const void* context, Index part, Index column, Index count);
    const void* context;
};

// Computes the parts in tiles of Product::TILE_PANELS panels, or what is left of them, with
// product.panels(part, first, count). `after` may be null.
template <typename Product>
static void multiply(const Product& product, const LinearPart* parts, Index num_parts, const AfterColumns* after) {
    if (product.num_tokens == 0) return;
    constexpr Index WIDTH = Product::TILE_PANELS;
    const auto num_tiles = [&](Index p) { return (parts[p].d_out / PANEL + WIDTH - 1) / WIDTH; };
    Index total = 0;
    for (Index p = 0; p < num_parts; ++p) total += num_tiles(p);
    const auto some_tiles = [&](Index p, Index begin, Index end) {
        const Index last_panel = std::min(parts[p].d_out / PANEL, end * WIDTH);
        for (Index first = begin * WIDTH; first < last_panel; first += WIDTH)
            product.panels(parts[p], first, std::min(last_panel - first, WIDTH));
        if (after) after->run(after->context, p, begin * WIDTH * PANEL, (last_panel - begin * WIDTH) * PANEL);
    };
    // Neighbouring tiles in a row, because their weights lie in a row; the longer, the more is to be done after.
    const Index rows_per_thread = after ? 2 : 4;
    const Index in_a_row = std::clamp<Index>(total / (rows_per_thread * num_threads()), 1, MOST_IN_A_ROW);
    parallel((total + in_a_row - 1) / in_a_row, [&](Index row) {
        Index begin = row * in_a_row, end = std::min(total, begin + in_a_row);
        for (Index p = 0; p < num_parts && end > 0; begin -= num_tiles(p), end -= num_tiles(p), ++p)
            if (begin < num_tiles(p)) some_tiles(p, std::max<Index>(begin, 0), std::min(end, num_tiles(p)));
    });
}

// Where the panel `bytes_left` behind `here` ends, the next tile goes on behind this tile's other panels.
static inline void prefetch_panel(const void* here, Index bytes_left, Index panel_bytes, int num_panels) {
    const Index ahead = PREFETCH_BYTES + (bytes_left <= PREFETCH_BYTES ? (num_panels - 1) * panel_bytes : 0);
    __builtin_prefetch(static_cast<const char*>(here) + ahead);
}
