// y = x W^T + b for bfloat16 weights, packed once so that every load is 64 bytes in a row and none is shuffled.
//
// Packed: panels of 16 outputs; in a panel, for each pair of inputs, the 16 outputs' pairs of weights, which is what the
// processor's pairwise product takes: [d_out / 16][d_in / 2][16][2]. A tile of 8 tokens by 3 panels keeps 24 sums in
// registers. Where there is no such product, weights are widened to float32 as they are read, and so are the inputs, once.

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

static PairProduct product_of(const Tokens& tokens) {
    return {static_cast<const uint16_t*>(tokens.x), tokens.num_tokens, tokens.d_in, tokens.x_stride};
}

#elif defined(__AVX2__)

#include <vector>

constexpr int WIDTH = 8;  // numbers that one register of the processor holds; of wider ones the compiler makes memory
constexpr int PIECES = PANEL / WIDTH;  // registers for a number of each output of a panel
typedef float Register __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

struct PairProduct {
    static constexpr int MOST_TOKENS = 4;
    const float* x;
    Index num_tokens, d_in;

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        const Index num_pairs = d_in / 2;
        const float* inputs = x + token * d_in;
        const uint16_t* weights = static_cast<const uint16_t*>(part.weights) + panel * d_in * PANEL;
        Register sums[TOKENS][PANELS][PIECES] = {};
        for (Index pair = 0; pair < num_pairs; ++pair)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p)
                add_pair(sums, p, inputs + 2 * pair, weights + (p * num_pairs + pair) * 2 * PANEL);
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p) {
                Lanes all;
                std::memcpy(&all, sums[t][p], sizeof all);
                finish<BFloat16>(all, part, token + t, (panel + p) * PANEL);
            }
    }

    // Adds a pair of inputs of each token with 16 pairs of weights: the lower halves of words, then the upper ones.
    template <int TOKENS, int PANELS>
    void add_pair(Register (&sums)[TOKENS][PANELS][PIECES], int p, const float* inputs, const uint16_t* weights) const {
#pragma GCC unroll 4
        for (int piece = 0; piece < PIECES; ++piece) {
            Words words;
            std::memcpy(&words, weights + piece * 2 * WIDTH, sizeof words);
            const Register lower = (Register)(words << 16), upper = (Register)(words & 0xffff0000u);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t) {
                sums[t][p][piece] += inputs[t * d_in] * lower;
                sums[t][p][piece] += inputs[t * d_in + 1] * upper;
            }
        }
    }
};

static PairProduct product_of(const Tokens& tokens) {
    static thread_local std::vector<float> widened;  // kept: a step has hundreds of products
    float* numbers = (widened.resize(tokens.num_tokens * tokens.d_in), widened.data());
    const auto* x = static_cast<const BFloat16*>(tokens.x);
    for (Index token = 0; token < tokens.num_tokens; ++token)
        for (Index i = 0; i < tokens.d_in; ++i)
            numbers[token * tokens.d_in + i] = to_float(x[token * tokens.x_stride + i]);
    return {numbers, tokens.num_tokens, tokens.d_in};
}

#endif

#if defined(__AVX512BF16__) || defined(__AVX2__)

extern "C" int has_packed_linear() { return 1; }

extern "C" void packed_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    multiply(product_of(*tokens), parts, num_parts);
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
