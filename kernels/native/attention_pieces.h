// How the work of attention is shared out among the threads. What a token gets does not depend on it.
//
// The only token of a request is one item for all key-value heads, so that the cache is read as it lies, and
// neighbouring requests are one piece of work, up to about a share: a quarter of what a thread has to read. A request
// longer than a share would be waited for, so it is a piece for each key-value head, and these come first.
#pragma once

#include "attention.h"
#include "cache_tiles.h"
#include "threads.h"

#include <algorithm>
#include <vector>

constexpr Index TOKENS_TOGETHER = 16;

// Tokens [first, first + count) of one request, and the key-value heads [first_head, last_head).
struct Item {
    Index first, count, first_head, last_head;
};

// Neighbouring items, which one thread takes together.
struct Pieces {
    std::vector<Item> items;
    std::vector<Index> starts;  // [num_pieces], places in items

    Index count() const { return starts.size(); }

    Index end(Index piece) const { return piece + 1 < count() ? starts[piece + 1] : items.size(); }

    void begin_piece() { starts.push_back(items.size()); }

    void add_by_heads(Index first, Index count, Index num_kv_heads) {
        for (Index head = 0; head < num_kv_heads; ++head) {
            begin_piece();
            items.push_back({first, count, head, head + 1});
        }
    }
};

static inline Index first_position(const Attention& a, Index token) {
    return a.window > 0 ? std::max<Index>(0, a.lengths[token] - a.window) : 0;
}

static inline Index num_positions(const Attention& a, Index token) {
    return a.lengths[token] - first_position(a, token);
}

// Tokens that are alone in their requests. A piece of several reads two shares at most: the middles of all that are in
// it lie in the same one.
static void share_requests(const Attention& a, Pieces& pieces) {
    Index total = 0;
    for (Index token = 0; token < a.num_tokens; ++token) total += num_positions(a, token);
    const Index share = total / (4 * num_threads());
    for (Index token = 0; token < a.num_tokens; ++token)
        if (num_positions(a, token) > share) pieces.add_by_heads(token, 1, a.num_kv_heads);
    Index position = 0, last_share = -1;
    for (Index token = 0; token < a.num_tokens; ++token) {
        const Index length = num_positions(a, token);
        if (length > share) continue;
        const Index middle_share = (position + length / 2) / share;
        if (middle_share != last_share) pieces.begin_piece();
        pieces.items.push_back({token, 1, 0, a.num_kv_heads});
        last_share = middle_share;
        position += length;
    }
}

// Neighbouring tokens of a request are a piece for each key-value head. It ends where a tile of its newest token does:
// its tokens meet each other's values, by weights of nought if need be, and what is not finite may not reach an earlier
// block so.
static void share_chunks(const Attention& a, Pieces& pieces) {
    for (Index first = 0, count; first < a.num_tokens; first += count) {
        count = 1;
        while (count < TOKENS_TOGETHER && first + count < a.num_tokens &&
               a.block_starts[first + count] == a.block_starts[first] &&
               a.lengths[first + count - 1] % a.block_size % TILE != 0)
            ++count;
        pieces.add_by_heads(first, count, a.num_kv_heads);
    }
}

static inline void share_out(const Attention& a, Pieces& pieces) {
    pieces.items.clear();
    pieces.starts.clear();
    if (a.are_single)
        share_requests(a, pieces);
    else
        share_chunks(a, pieces);
}
