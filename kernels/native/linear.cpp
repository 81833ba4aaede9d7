// y = x W^T + b for bfloat16 weights, packed once so that every load is 64 bytes in a row and none is shuffled.
//
// Packed: panels of 16 outputs; in a panel, for each pair of inputs, the 16 outputs' pairs of weights, which is what the
// processor's products of pairs take: [d_out / 16][d_in / 2][16][2].

#include "pair_product.h"
#include "tile_product.h"
#include "widening_product.h"

#if defined(HAS_PAIR_PRODUCT)
using VectorProduct = PairProduct;
#elif defined(HAS_WIDENING_PRODUCT)
using VectorProduct = WideningProduct;
#endif

#if defined(HAS_PAIR_PRODUCT) || defined(HAS_WIDENING_PRODUCT)

extern "C" int has_packed_linear() { return 1; }

extern "C" void packed_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts,
                                   const AfterPair* after) {
#ifdef HAS_TILE_REGISTERS
    if (tiles_take(tokens->d_in)) return multiply(TileProduct(*tokens), parts, num_parts, after);
#endif
    multiply(VectorProduct(*tokens), parts, num_parts, after);
}

#else

extern "C" int has_packed_linear() { return 0; }

extern "C" void packed_linear_bf16(const Tokens*, const LinearPart*, Index, const AfterPair*) {}

#endif

// Copies whole rows out of a packed weight: rows [num_rows, d_in] of the outputs `ids`.
extern "C" void unpack_rows(const uint16_t* packed, const Index* ids, Index num_rows, Index d_in, uint16_t* rows) {
    constexpr Index LINE = 32;  // numbers that are read for each pair
    parallel_ranges(num_rows, num_rows * d_in / 2 * LINE, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            const Index panel = ids[row] / PANEL, output = ids[row] % PANEL;
            const uint16_t* from = packed + panel * d_in * PANEL + output * 2;
            for (Index pair = 0; pair < d_in / 2; ++pair)
                std::memcpy(rows + row * d_in + 2 * pair, from + pair * 2 * PANEL, 2 * sizeof(uint16_t));
        }
    });
}
