// How keys and values of bfloat16 lie in the cache where the processor multiplies pairs: as attention's products take them, so
// that nothing is laid out anew whenever it is read.
//
//     keys    [tiles of 16 slots][kv_heads][dim / 2][16 slots][2 dims]
//     values  [tiles of 16 slots][kv_heads][8 pairs of slots][value_dim][2 slots]
//
// A request fills a tile from its first slot on. Slots behind the newest one are zeros, because a tile is read whole, and what
// another request left there may not be a number.
#pragma once

#include "number.h"

constexpr Index TILE = 16;  // neighbouring slots
constexpr Index MAX_DIM = 256;

// A head's tile in the keys or the values, whose rows have `dim` numbers.
template <typename Pointer>
static inline Pointer tile_of_head(Pointer cache, Index slot, Index num_heads, Index head, Index dim) {
    return cache + (slot / TILE * num_heads + head) * TILE * dim;
}

// How many slots behind a new token's must be cleared: what is left of its tile, if it is the last of new ones that begin it.
static inline Index num_to_clear(const Index* slots, Index num_tokens, Index token) {
    const Index slot = slots[token], place = slot % TILE;
    const bool begin_tile = token >= place && slots[token - place] == slot - place;
    const bool is_last = token + 1 == num_tokens || slots[token + 1] != slot + 1;
    return begin_tile && is_last ? TILE - 1 - place : 0;
}

struct CacheTiles {
    BFloat16* keys;
    BFloat16* values;
    Index num_heads, dim, value_dim;

    // Key [num_heads, dim] and value [num_heads, value_dim] of a token, zeros in so many slots behind it.
    void store(Index slot, Index num_clear, const BFloat16* key, const BFloat16* value) const {
        static constexpr BFloat16 ZEROS[MAX_DIM] = {};
        const Index place = slot % TILE;
        for (Index head = 0; head < num_heads; ++head) {
            BFloat16* key_tile = tile_of_head(keys, slot, num_heads, head, dim);
            BFloat16* value_tile = tile_of_head(values, slot, num_heads, head, value_dim);
            store_key(key + head * dim, key_tile, place);
            store_value(value + head * value_dim, value_tile, place);
            for (Index behind = place + 1; behind <= place + num_clear; ++behind) {
                store_key(ZEROS, key_tile, behind);
                store_value(ZEROS, value_tile, behind);
            }
        }
    }

private:
    void store_key(const BFloat16* key, BFloat16* tile, Index place) const {
        for (Index pair = 0; pair < dim / 2; ++pair)
            std::memcpy(tile + (pair * TILE + place) * 2, key + 2 * pair, 2 * sizeof(BFloat16));
    }

    void store_value(const BFloat16* value, BFloat16* tile, Index place) const {
        BFloat16* row = tile + place / 2 * value_dim * 2 + place % 2;
        for (Index i = 0; i < value_dim; ++i) row[2 * i] = value[i];
    }
};
