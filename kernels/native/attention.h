// Attention of new tokens over the blocks of their requests in the paged cache.
#pragma once

#include "number.h"

struct Attention {
    const void* query;           // [tokens of the batch, num_heads, dim]
    const void* keys;            // [num_slots, num_kv_heads, dim]
    const void* values;          // [num_slots, num_kv_heads, value_dim]
    void* output;                // [tokens of the batch, num_heads, value_dim]
    const Index* tokens;         // [num_tokens], places in the batch
    const Index* blocks;         // the requests' blocks, one request behind the other
    const Index* block_starts;   // [num_tokens], where the blocks of each one's request begin
    const Index* lengths;        // [num_tokens], positions to attend to, the token's own included
    const float* sinks;          // [num_heads], scores of nothing, which take part in the softmax; or null
    Index num_tokens, num_heads, num_kv_heads, dim, value_dim, block_size;
    Index are_single;              // every token is the only one of its request
    Index is_tiled;              // keys and values lie in tiles, see cache_tiles.h
    Index window;                // last positions to attend to, 0 for all
    float scale;
    float softcap;               // 0 for none
};

template <typename Number>
void attend(const Attention& attention);
