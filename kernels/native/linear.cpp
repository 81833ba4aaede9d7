// y = x W^T + b for weights packed once so that every load is 64 bytes in a row and none is shuffled: panels of 16 outputs;
// in a panel, for each run of inputs, the 16 outputs' weights (widening_product.h).

#include "pair_product.h"
#include "tile_product.h"
#include "widening_product.h"

#ifdef HAS_PAIR_PRODUCT
using VectorProduct = PairProduct;
#elif defined(HAS_WIDENING_PRODUCT)
using VectorProduct = WideningProduct<BFloat16>;
#endif

extern "C" {
#ifdef HAS_WIDENING_PRODUCT

int has_packed_linear() { return 1; }

void packed_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
#ifdef HAS_TILE_REGISTERS
    if (tiles_take(tokens->d_in)) return multiply(TileProduct(*tokens), parts, num_parts, after);
#endif
    multiply(VectorProduct(*tokens), parts, num_parts, after);
}

void packed_linear_f32(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    multiply(WideningProduct<float>(*tokens), parts, num_parts, after);
}

void packed_linear_f16(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    multiply(WideningProduct<Float16>(*tokens), parts, num_parts, after);
}

#else

int has_packed_linear() { return 0; }

void packed_linear_bf16(const Tokens*, const LinearPart*, Index, const AfterPair*) {}
void packed_linear_f32(const Tokens*, const LinearPart*, Index, const AfterPair*) {}
void packed_linear_f16(const Tokens*, const LinearPart*, Index, const AfterPair*) {}

#endif
}

// Copies whole rows out of a packed weight: rows [num_rows, num_runs] of the outputs `ids`, a run being a Word.
template <typename Word>
static void unpack_rows(const Word* packed, const Index* ids, Index num_rows, Index num_runs, Word* rows) {
    constexpr Index LINE = 64 / sizeof(uint16_t);  // numbers that are read for each run
    parallel_ranges(num_rows, num_rows * num_runs * LINE, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            const Word* from = packed + ids[row] / PANEL * num_runs * PANEL + ids[row] % PANEL;
            for (Index run = 0; run < num_runs; ++run) rows[row * num_runs + run] = from[run * PANEL];
        }
    });
}

extern "C" {
void unpack_rows_4(const uint32_t* packed, const Index* ids, Index num_rows, Index num_runs, uint32_t* rows) {
    unpack_rows(packed, ids, num_rows, num_runs, rows);
}
void unpack_rows_2(const uint16_t* packed, const Index* ids, Index num_rows, Index num_runs, uint16_t* rows) {
    unpack_rows(packed, ids, num_rows, num_runs, rows);
}
}
