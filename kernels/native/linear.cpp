// y = x W^T + b for bfloat16 weights, packed once so that every load is 64 bytes in a row and none is shuffled.
//
// Packed: panels of 16 outputs; in a panel, for each pair of inputs, the 16 outputs' pairs of weights, which is what the
// processor's pairwise product takes: [d_out / 16][d_in / 2][16][2]. A tile of 8 tokens by 3 panels keeps 24 sums in
// registers. Each output is summed over the inputs in order, so it does not depend on how many tokens there are.

#include "threads.h"
#include "tokens.h"

#include <algorithm>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

constexpr Index PANEL = 16;       // outputs
constexpr Index TILE_PANELS = 3;  // panels in a tile
constexpr Index TILE_TOKENS = 8;
constexpr Index PREFETCH_BYTES = 4096;
constexpr Index MOST_IN_A_ROW = 8;  // tiles that one thread takes at once

// One of the modules that share an input. y: [num_tokens, d_out]; add: y += instead of y =.
struct LinearPart {
    const uint16_t* packed;
    const uint16_t* bias;  // [d_out] or null
    uint16_t* y;
    Index d_out;
    Index add;
};

#ifdef __AVX512BF16__

static inline __m512 widen(const uint16_t* numbers) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

static inline void finish(__m512 sum, const LinearPart& part, Index token, Index output) {
    uint16_t* y = part.y + token * part.d_out + output;
    if (part.bias) sum = _mm512_add_ps(sum, widen(part.bias + output));
    if (part.add) sum = _mm512_add_ps(sum, widen(y));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), (__m256i)_mm512_cvtneps_pbh(sum));
}

template <int TOKENS, int PANELS>
static inline void tile(const Tokens& tokens, const LinearPart& part, Index token, Index panel, bool is_first) {
    const Index num_pairs = tokens.d_in / 2;
    const uint16_t* x = static_cast<const uint16_t*>(tokens.x) + token * tokens.x_stride;
    const uint16_t* weights = part.packed + panel * num_pairs * 2 * PANEL;
    __m512 sums[TOKENS][PANELS] = {};
    const Index panel_bytes = num_pairs * 2 * PANEL * static_cast<Index>(sizeof(uint16_t));
    for (Index pair = 0; pair < num_pairs; ++pair) {
        // At the end of a panel, the beginning of the one that this place of the next tile reads.
        const bool is_at_end = (pair + 1) * 64 + PREFETCH_BYTES > panel_bytes;
        const Index ahead = PREFETCH_BYTES + (is_at_end ? (PANELS - 1) * panel_bytes : 0);
        __m512bh panels[PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) {
            const uint16_t* here = weights + (p * num_pairs + pair) * 2 * PANEL;
            panels[p] = (__m512bh)_mm512_loadu_si512(here);
            if (is_first) _mm_prefetch(reinterpret_cast<const char*>(here) + ahead, _MM_HINT_T0);
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            int inputs;
            std::memcpy(&inputs, x + t * tokens.x_stride + 2 * pair, sizeof inputs);
            const __m512bh both = (__m512bh)_mm512_set1_epi32(inputs);
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) sums[t][p] = _mm512_dpbf16_ps(sums[t][p], both, panels[p]);
        }
    }
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) finish(sums[t][p], part, token + t, (panel + p) * PANEL);
}

template <int PANELS>
static void all_tokens(const Tokens& tokens, const LinearPart& part, Index panel) {
    Index token = 0;
    for (; token + TILE_TOKENS <= tokens.num_tokens; token += TILE_TOKENS)
        tile<TILE_TOKENS, PANELS>(tokens, part, token, panel, token == 0);
    if (token + 4 <= tokens.num_tokens) {
        tile<4, PANELS>(tokens, part, token, panel, token == 0);
        token += 4;
    }
    for (; token < tokens.num_tokens; ++token) tile<1, PANELS>(tokens, part, token, panel, token == 0);
}

// Panels [first, first + TILE_PANELS) of the part, or what is left of them.
static void some_panels(const Tokens& tokens, const LinearPart& part, Index first) {
    const Index left = part.d_out / PANEL - first;
    if (left >= 3) return all_tokens<3>(tokens, part, first);
    if (left == 2) return all_tokens<2>(tokens, part, first);
    all_tokens<1>(tokens, part, first);
}

static Index num_tiles(const LinearPart& part) {
    return (part.d_out / PANEL + TILE_PANELS - 1) / TILE_PANELS;
}

extern "C" int has_packed_linear() { return 1; }

extern "C" void packed_linear(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    Index total = 0;
    for (Index p = 0; p < num_parts; ++p) total += num_tiles(parts[p]);
    const auto one_tile = [&](Index index) {
        const LinearPart* part = parts;
        while (index >= num_tiles(*part)) index -= num_tiles(*part++);
        some_panels(*tokens, *part, index * TILE_PANELS);
    };
    // Neighbouring tiles in a row, because their weights lie in a row.
    const Index in_a_row = std::clamp<Index>(total / (4 * num_threads()), 1, MOST_IN_A_ROW);
    parallel((total + in_a_row - 1) / in_a_row, [&](Index row) {
        for (Index tile = row * in_a_row; tile < std::min(total, (row + 1) * in_a_row); ++tile) one_tile(tile);
    });
}

#else

extern "C" int has_packed_linear() { return 0; }

extern "C" void packed_linear(const Tokens*, const LinearPart*, Index) {}

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
