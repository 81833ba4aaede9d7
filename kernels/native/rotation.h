// Queries and keys turned to their positions.
#pragma once

#include "number.h"

struct Heads {
    void* query;        // [num_tokens, num_heads * dim], turned in place
    const void* key;    // [num_tokens, num_kv_heads * dim]
    const void* value;  // [num_tokens, num_kv_heads * dim]
    const float* cos;   // [num_tokens, turned]
    const float* sin;   // [num_tokens, turned]
    void* keys;         // the cache, [num_slots, num_kv_heads, dim] or tiles
    void* values;
    const Index* slots;  // [num_tokens]
    Index num_tokens, num_heads, num_kv_heads, dim;
    Index turned;         // numbers of a head that are turned, the first ones
    Index is_tiled;       // the cache, see cache_tiles.h
    Index by_neighbours;  // pairs are neighbours, not counterparts in the halves of what is turned
};

// Turns queries in place; turned keys, and values, go to their slots.
template <typename Number>
void rotate_and_store(const Heads& heads);
