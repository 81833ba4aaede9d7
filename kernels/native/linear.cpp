// y = x W^T + b for bfloat16 weights, packed once so that every load is 64 bytes in a row and none is shuffled.
//
// Packed: panels of 16 outputs; in a panel, for each pair of inputs, the 16 outputs' pairs of weights, which is what the
// processor's pairwise product takes: [d_out / 16][d_in / 2][16][2]. A tile of 8 tokens by 3 panels keeps 24 sums in
// registers.

#include "lanes.h"
#include "panels.h"
#include "tokens.h"

#ifdef __AVX512BF16__

struct PairProduct {
    static constexpr int MOST_TOKENS = 8;
    const uint16_t* x;
    Index num_tokens, d_in, x_stride;

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        const Index num_pairs = d_in / 2, panel_bytes = d_in * PANEL * static_cast<Index>(sizeof(uint16_t));
        const uint16_t* inputs = x + token * x_stride;
        const uint16_t* weights = static_cast<const uint16_t*>(part.weights) + panel * d_in * PANEL;
        __m512 sums[TOKENS][PANELS] = {};
        for (Index pair = 0; pair < num_pairs; ++pair) {
            __m512bh panels[PANELS];
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) {
                const uint16_t* here = weights + (p * num_pairs + pair) * 2 * PANEL;
                panels[p] = (__m512bh)_mm512_loadu_si512(here);
                if (token == 0) prefetch_panel(here, panel_bytes - (pair + 1) * 64, panel_bytes, PANELS);
            }
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t) {
                int both;
                std::memcpy(&both, inputs + t * x_stride + 2 * pair, sizeof both);
                const __m512bh pairs = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) sums[t][p] = _mm512_dpbf16_ps(sums[t][p], pairs, panels[p]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) finish<BFloat16>((Lanes)sums[t][p], part, token + t, (panel + p) * PANEL);
    }
};

extern "C" int has_packed_linear() { return 1; }

extern "C" void packed_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    const auto* x = static_cast<const uint16_t*>(tokens->x);
    multiply(PairProduct{x, tokens->num_tokens, tokens->d_in, tokens->x_stride}, parts, num_parts);
}

#else

extern "C" int has_packed_linear() { return 0; }

extern "C" void packed_linear_bf16(const Tokens*, const LinearPart*, Index) {}

#endif

// Copies whole rows out of a packed weight: rows [num_rows, d_in] of the outputs `ids`.
extern "C" void unpack_rows(const uint16_t* packed, const Index* ids, Index num_rows, Index d_in, uint16_t* rows) {
    parallel_ranges(num_rows, num_rows * d_in, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row) {
            const Index panel = ids[row] / PANEL, output = ids[row] % PANEL;
            const uint16_t* from = packed + panel * d_in * PANEL + output * 2;
            for (Index pair = 0; pair < d_in / 2; ++pair)
                std::memcpy(rows + row * d_in + 2 * pair, from + pair * 2 * PANEL, 2 * sizeof(uint16_t));
        }
    });
}
