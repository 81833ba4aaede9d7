// Stores keys and values in a cache of tiles, for layers that turn them elsewhere.

#include "cache_tiles.h"

#include "threads.h"

extern "C" {
int has_cache_tiles() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

void store_in_tiles_bf16(const BFloat16* keys, const BFloat16* values, const Index* slots, Index num_tokens,
                         const CacheTiles* cache) {
    const Index key_width = cache->num_heads * cache->dim, value_width = cache->num_heads * cache->value_dim;
    parallel_ranges(num_tokens, num_tokens * (key_width + value_width), [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token)
            cache->store(slots[token], num_to_clear(slots, num_tokens, token), keys + token * key_width,
                         values + token * value_width);
    });
}
}
