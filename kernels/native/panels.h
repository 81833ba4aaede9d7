// How a product y = x W^T is cut into tiles, some tokens by a few panels of 16 outputs, and shared out between threads.
//
// Each output is summed over the inputs in order, so it does not depend on how many tokens there are.
#pragma once

#include "lanes.h"
#include "lines.h"
#include "low_rank.h"
#include "threads.h"
#include "tokens.h"

#include <algorithm>

constexpr Index PANEL = 16;         // outputs
constexpr Index GROUP = 32;         // inputs that share a scale of quantized weights
constexpr Index MOST_IN_A_ROW = 8;  // tiles that one thread takes at once
constexpr Index PREFETCH_BYTES = 4096, ONCE_PREFETCH_BYTES = 8192;
#ifdef __SSE4A__
constexpr int ONCE_LOCALITY = 0;  // AMD: what is read past the caches leaves them to what comes back sooner
#else
constexpr int ONCE_LOCALITY = 3;  // Intel reads past its second cache, too, at a third to half of the speed
#endif
constexpr Index FEW_TOKENS = 16;
constexpr Index LEAST_SHARE = 64;   // tokens of a thread's own
constexpr Index SHARE_STEP = 32;    // and what their number is a multiple of
constexpr Index MOST_OUTPUTS_PER_TOKEN = 4;  // of which threads have tokens of their own; all of them read all weights
constexpr Index MOST_PAIR_BYTES = 256 * 1024;  // of columns that one thread takes at once and does not keep

// One of the modules that share an input. y: [num_tokens, d_out], rows y_stride apart; add: y += instead of y =.
struct LinearPart {
    const void* weights;  // in panels
    const void* scales;   // of quantized weights
    const void* bias;     // [d_out] or null
    void* y;
    Index y_stride, d_out;
    Index add;
    const AddedRows* rows;  // what adapters add, or null
};

// True if a product's tiles are single panels. With few registers those of several tokens are. With many they are for few
// tokens, which take less long to multiply than weights to read: in one run they are read fastest, and stay in the nearest
// cache for the next tokens.
template <typename Product>
static bool takes_single_panels(const Product& product) {
    return HAS_MANY_REGISTERS ? product.num_tokens <= FEW_TOKENS : product.num_tokens > 1;
}

// The tile of `count` tokens, at most MOST.
template <int PANELS, int MOST, typename Product>
static void tile_of_tokens(const Product& product, const LinearPart& part, Index token, Index count, Index panel) {
    if (count == MOST) return product.template tile<MOST, PANELS>(part, token, panel);
    if constexpr (MOST > 1) tile_of_tokens<PANELS, MOST - 1>(product, part, token, count, panel);
}

template <int PANELS, int MOST, typename Product>
static void all_tokens(const Product& product, const LinearPart& part, Index panel) {
    for (Index token = 0; token < product.num_tokens; token += MOST)
        tile_of_tokens<PANELS, MOST>(product, part, token, std::min<Index>(product.num_tokens - token, MOST), panel);
}

// Some panels of a product whose registers hold the sums of up to MOST_TOKENS tokens with three of them, or of up to
// MOST_BY_A_PANEL with one; it has num_tokens and tile<TOKENS, PANELS>(part, token, panel).
template <typename Product>
static void few_by_few(const Product& product, const LinearPart& part, Index first, Index count) {
    if (count == 1 || takes_single_panels(product)) {
        for (Index panel = first; panel < first + count; ++panel)
            all_tokens<1, Product::MOST_BY_A_PANEL>(product, part, panel);
    } else if (count == 2) {
        all_tokens<2, Product::MOST_TOKENS>(product, part, first);
    } else {
        all_tokens<3, Product::MOST_TOKENS>(product, part, first);
    }
}

// What the tile that begins with `token` asks for, in so many steps, of the panels behind its own, which take `num_bytes`.
// The first tile waits for its own panels; those after it, which have them in a cache, share out the next. Behind the last
// panels there may be nothing, and then nothing is read.
template <typename Product>
static LinesAhead panels_ahead(const Product& product, Index token, const void* behind, Index num_bytes, Index num_steps) {
    if (token == 0) return {};
    const Index num_tiles = (product.num_tokens - 1) / Product::MOST_TOKENS, tile = token / Product::MOST_TOKENS - 1;
    const Index most = num_tiles * num_steps * LINE_BYTES, each = (num_bytes + most - 1) / most;
    return {static_cast<const char*>(behind) + tile * num_steps * each * LINE_BYTES, each};
}

// Stores 16 sums as outputs of a token, with the bias, onto what is there if the part says so; rounded once.
template <typename Number>
static inline void finish(Lanes sums, const LinearPart& part, Index token, Index output) {
    Number* y = static_cast<Number*>(part.y) + token * part.y_stride + output;
    if (part.bias) sums += load_lanes(static_cast<const Number*>(part.bias) + output);
    if (part.add) sums += load_lanes(y);
    store_lanes(sums, y);
}

// What two parts of one width are for if nobody keeps them: a thread hands each block on as soon as it is there.
struct AfterPair {
    // A block of both parts; their y are the thread's own memory, and begin with the block's first token.
    void (*run)(const void* context, const LinearPart* parts, const Block& block);
    const void* context;
    Index number_bytes;
};

// Adds what adapters say to a block of outputs that are there, unless the product has.
template <typename Product>
static inline void add_rank_rows(const LinearPart& part, const Block& block) {
    if constexpr (!Product::ADDS_RANK_ROWS)
        if (part.rows) part.rows->expand({part.y, part.y_stride}, block);
}

// Outputs are shared out in units of so many panels: of single ones where that is no slower, so that threads get as many.
template <typename Product>
static Index num_units(const Product& product, const LinearPart& part) {
    return (part.d_out + product.unit() * PANEL - 1) / (product.unit() * PANEL);
}

// A panel that is filled up with zeros, of which there are fewer outputs than it has: by way of rows that have room for it.
template <typename Product>
static void cut_panel(const Product& product, const LinearPart& part, Index panel) {
    using Number = typename Product::Number;
    static thread_local Lines<Number> room;
    const Index output = panel * PANEL, count = part.d_out - output;
    Number* y = static_cast<Number*>(part.y) + output;
    Number *bias = room.make_room((product.num_tokens + 1) * PANEL), *rows = bias + PANEL;
    LinearPart whole = part;
    whole.y = rows - output;
    whole.y_stride = PANEL;
    if (part.bias) {
        std::copy_n(static_cast<const Number*>(part.bias) + output, count, bias);
        whole.bias = bias - output;
    }
    for (Index token = 0; part.add && token < product.num_tokens; ++token)
        std::copy_n(y + token * part.y_stride, count, rows + token * PANEL);
    product.panels(whole, panel, 1);
    for (Index token = 0; token < product.num_tokens; ++token)
        std::copy_n(rows + token * PANEL, count, y + token * part.y_stride);
}

// Units [begin, end) of a part, in tiles of as many panels each, if it has its choice.
template <typename Product>
static void some_units(const Product& product, const LinearPart& part, Index begin, Index end) {
    const Index last = std::min(part.d_out / PANEL, end * product.unit()), count = last - begin * product.unit();
    if (last < end * product.unit() && part.d_out % PANEL > 0) cut_panel(product, part, last);
    if (count == 0) return;
    const Index num_tiles = (count + Product::TILE_PANELS - 1) / Product::TILE_PANELS;
    const Index width = product.unit() == 1 ? (count + num_tiles - 1) / num_tiles : Product::TILE_PANELS;
    for (Index first = last - count; first < last; first += width)
        product.panels(part, first, std::min(last - first, width));
}

// Rows of up to `most` units, as many for each thread: few, because weights lie in a row, the fewer, the more is done after.
template <typename Product>
static Index num_rows(const Product& product, Index num_units, Index most, bool has_after) {
    const Index threads = num_threads(), num_tiles = num_units * product.unit() / Product::TILE_PANELS;
    const Index each = std::clamp<Index>(num_tiles / (2 * threads), 1, has_after ? 2 : 4);
    return std::min(std::max(each, (num_units + threads * most - 1) / (threads * most)) * threads, num_units);
}

// Calls take(some, token, begin, end) for rows of units [begin, end), `some` being the product with tokens from `token` on:
// with all of them or, where the product is so fast that reading them takes long, each thread's own, which stay in its cache.
template <typename Product, typename Take>
static void by_rows(const Product& product, Index num_outputs, Index num_units, Index num_rows, const Take& take) {
    const auto some_rows = [&](const Product& some, Index token, Index row) {
        take(some, token, num_units * row / num_rows, num_units * (row + 1) / num_rows);
    };
    if constexpr (Product::SHARES_TOKENS) {
        const bool is_shared = num_outputs <= MOST_OUTPUTS_PER_TOKEN * product.num_tokens;
        const Index num_shares = is_shared ? std::clamp<Index>(product.num_tokens / LEAST_SHARE, 1, num_threads()) : 1;
        const Index num_steps = (product.num_tokens + SHARE_STEP - 1) / SHARE_STEP;
        const auto first_of = [&](Index share) {
            return std::min(num_steps * share / num_shares * SHARE_STEP, product.num_tokens);
        };
        parallel(num_shares * num_rows, [&](Index piece) {
            const Index share = piece / num_rows, token = first_of(share);
            some_rows(product.share(token, first_of(share + 1) - token), token, piece % num_rows);
        });
    } else {
        parallel(num_rows, [&](Index row) { some_rows(product, 0, row); });
    }
}

// The same columns of both parts by one thread, which hands them on before it takes others.
template <typename Product>
static void multiply_pair(const Product& product, const LinearPart* parts, const AfterPair& after) {
    const Index width = product.unit() * PANEL, total = num_units(product, parts[0]);
    const Index unit_bytes = 2 * product.num_tokens * width * after.number_bytes;
    const Index most = std::clamp<Index>(MOST_PAIR_BYTES / unit_bytes, 1, MOST_IN_A_ROW * Product::TILE_PANELS / product.unit());
    const Index rows = num_rows(product, total, most, true);
    by_rows(product, 2 * parts[0].d_out, total, rows, [&](const Product& some, Index token, Index begin, Index end) {
        const Index column = begin * width, count = std::min(parts[0].d_out, end * width) - column;
        const Index part_bytes = some.num_tokens * count * after.number_bytes;
        const Block block{token, some.num_tokens, column, count};
        static thread_local Lines<char> own;
        char* y = own.make_room(2 * part_bytes) - column * after.number_bytes;
        LinearPart pair[] = {parts[0], parts[1]};
        for (LinearPart& part : pair) {
            part.y = y;
            part.y_stride = count;
            y += part_bytes;
            some_units(some, part, begin, end);
            add_rank_rows<Product>(part, block);
        }
        after.run(after.context, pair, block);
    });
}

// Computes the parts in tiles of up to Product::TILE_PANELS panels with product.panels(part, first, count); with `after`,
// which may be null, a pair of them.
template <typename Product>
static void multiply(const Product& product, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    if (product.num_tokens == 0) return;
    if (after) return multiply_pair(product, parts, *after);
    const Index width = product.unit() * PANEL, most = MOST_IN_A_ROW * Product::TILE_PANELS / product.unit();
    Index total = 0;
    bool has_rows = false;
    for (Index p = 0; p < num_parts; ++p) {
        total += num_units(product, parts[p]);
        has_rows |= parts[p].rows != nullptr;
    }
    const Index rows = num_rows(product, total, most, has_rows);
    by_rows(product, total * width, total, rows, [&](const Product& some, Index token, Index begin, Index end) {
        for (Index p = 0, count; p < num_parts && end > 0; begin -= count, end -= count, ++p) {
            count = num_units(product, parts[p]);
            if (begin >= count) continue;
            const Index first = std::max<Index>(begin, 0), last = std::min(end, count), column = first * width;
            LinearPart part = parts[p];
            part.y = static_cast<typename Product::Number*>(part.y) + token * part.y_stride;
            some_units(some, part, first, last);
            add_rank_rows<Product>(part, {token, some.num_tokens, column, std::min(part.d_out, last * width) - column});
        }
    });
}

// Where the panel `bytes_left` behind `here` ends, the next tile goes on behind this tile's other panels. What is read ONCE
// need not take the place of anything else in the caches.
template <bool ONCE = false>
static inline void prefetch_panel(const void* here, Index bytes_left, Index panel_bytes, int num_panels) {
    constexpr Index BYTES = ONCE ? ONCE_PREFETCH_BYTES : PREFETCH_BYTES;
    const Index ahead = BYTES + (bytes_left <= BYTES ? (num_panels - 1) * panel_bytes : 0);
    __builtin_prefetch(static_cast<const char*>(here) + ahead, 0, ONCE ? ONCE_LOCALITY : 3);
}
