// The product for processors without one of bfloat16: weights are widened to float32 as they are read, and so are the
// inputs, once.
#pragma once

#include "panels.h"
#include "tokens.h"

#if defined(__AVX2__) && !defined(__AVX512BF16__)
#define HAS_WIDENING_PRODUCT 1

#include <vector>

constexpr int WIDTH = 8;  // numbers that one register of the processor holds; of wider ones the compiler makes memory
constexpr int PIECES = PANEL / WIDTH;  // registers for a number of each output of a panel
typedef float Register __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

struct WideningProduct {
    using Number = BFloat16;
    static constexpr bool SHARES_TOKENS = false, ADDS_RANK_ROWS = false;
    static constexpr Index TILE_PANELS = 3;
    static constexpr int MOST_TOKENS = 4, MOST_BY_A_PANEL = 4;
    const float* x;
    Index num_tokens, d_in;

    explicit WideningProduct(const Tokens& tokens)
        : x(widened(tokens)), num_tokens(tokens.num_tokens), d_in(tokens.d_in) {}

    Index unit() const { return takes_single_panels(*this) ? 1 : TILE_PANELS; }

    void panels(const LinearPart& part, Index first, Index count) const { few_by_few(*this, part, first, count); }

    // The tokens in float32 [num_tokens, d_in], until this thread's next product.
    static const float* widened(const Tokens& tokens) {
        static thread_local std::vector<float> numbers;  // kept: a step has hundreds of products
        numbers.resize(tokens.num_tokens * tokens.d_in);
        const auto* x = static_cast<const BFloat16*>(tokens.x);
        for (Index token = 0; token < tokens.num_tokens; ++token)
            for (Index i = 0; i < tokens.d_in; ++i)
                numbers[token * tokens.d_in + i] = to_float(x[token * tokens.x_stride + i]);
        return numbers.data();
    }

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

#endif
