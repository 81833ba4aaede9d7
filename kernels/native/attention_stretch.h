// What queries gather from a stretch of neighbouring positions.
#pragma once

#include "attention.h"
#include "attention_tiles.h"

#include <algorithm>
#include <type_traits>

// What a query head has gathered so far: sum_j e^(s_j - maximum) v_j and those weights' own sum.
struct Head {
    float maximum, total;
    float* sums;  // [value_dim]
};

// A query head of a token; it attends to the positions [begin, end).
template <typename Number>
struct Query {
    const Number* numbers;
    Index begin, end;
    Head* head;
};

// Where the tiles of a stretch begin, and how many slots each has: fewer than 16 at the end of a block.
struct Stretch {
    Index num_tiles;
    Index positions[STRETCH_TILES], slots[STRETCH_TILES], num_rows[STRETCH_TILES];
    bool is_whole;  // all tiles, side by side and all slots of each
};

// some(number, q): `number` queries from q on, four at a time and those that are left; a constant.
template <typename Some>
static inline void by_fours(Index count, const Some& some) {
    Index q = 0;
    for (; q + 4 <= count; q += 4) some(std::integral_constant<int, 4>(), q);
    if (count - q == 3) some(std::integral_constant<int, 3>(), q);
    if (count - q == 2) some(std::integral_constant<int, 2>(), q);
    if (count - q == 1) some(std::integral_constant<int, 1>(), q);
}

static inline void cap_scores(const Attention& a, const Stretch& stretch, float* scores) {
    const float cap = a.softcap / a.scale;  // before the scale
    for (Index i = 0; i < stretch.num_tiles * TILE; i += LANES)
        store_lanes(cap * tanh_lanes(load_lanes(scores + i) / cap), scores + i);
}

// Scores become e^(score - maximum), 0 outside the query's positions; returns how much the sums so far shrink.
template <typename Number>
static inline float weigh(const Attention& a, const Stretch& stretch, const Query<Number>& query, float* scores) {
    if (a.softcap > 0) cap_scores(a, stretch, scores);
    Head& head = *query.head;
    Lanes largest = Lanes{} - INFINITY;
    for (Index k = 0; k < stretch.num_tiles; ++k) {
        const Index begin = query.begin - stretch.positions[k];
        const Index end = std::min(query.end - stretch.positions[k], stretch.num_rows[k]);
        Lanes lanes = load_lanes(scores + k * TILE) * a.scale;
        if (begin > 0 || end < TILE) lanes = keep_lanes(lanes, begin, end, -INFINITY);
        store_lanes(lanes, scores + k * TILE);
        largest = lanes > largest ? lanes : largest;
    }
    const float maximum = std::max(head.maximum, largest_of(largest));
    Lanes total = {};
    for (Index k = 0; k < stretch.num_tiles; ++k) {
        const Lanes weights = exp_lanes(load_lanes(scores + k * TILE) - maximum);
        store_lanes(weights, scores + k * TILE);
        total += weights;
    }
    const float shrink = fast_exp(head.maximum - maximum);
    head.maximum = maximum;
    head.total = head.total * shrink + sum_of(total);
    return shrink;
}
