// The product in float32: weights are widened as they are read, and inputs once. It takes float32 and float16, and bfloat16
// on processors without a product of pairs.
//
// Packed: panels of 16 outputs; in a panel, for each run of inputs, the 16 outputs' weights: [d_out / 16][d_in / RUN][16]
// [RUN], a run being what the product of pairs takes in bfloat16, and one input in other types.
#pragma once

#include "lines.h"
#include "panels.h"
#include "threads.h"
#include "tokens.h"

#include <type_traits>

#ifdef __AVX2__
#define HAS_WIDENING_PRODUCT 1

constexpr int WIDTH = HAS_MANY_REGISTERS ? 16 : 8;  // numbers that one register holds; of wider ones compilers make memory
constexpr int PIECES = PANEL / WIDTH;               // registers for a number of each output of a panel
typedef float Register __attribute__((vector_size(WIDTH * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(WIDTH * sizeof(uint32_t))));

// A weight of each of WIDTH outputs, for each input of a run.
template <typename Number>
struct Weights {
    static constexpr int RUN = 1;
    Register numbers[1];

    explicit Weights(const Number* weights) {
        if constexpr (std::is_same_v<Number, float>)
            std::memcpy(numbers, weights, sizeof numbers);
        else
            numbers[0] = widened(weights);
    }

    static Register widened(const Float16* weights) {
#ifdef __AVX512F__
        return (Register)load_lanes(weights);
#elif defined(__F16C__)
        return (Register)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weights)));
#else
        Register wide;
        for (int i = 0; i < WIDTH; ++i) wide[i] = to_float(weights[i]);
        return wide;
#endif
    }
};

// The lower halves of words, and the upper ones.
template <>
struct Weights<BFloat16> {
    static constexpr int RUN = 2;
    Register numbers[2];

    explicit Weights(const BFloat16* weights) {
        Words words;
        std::memcpy(&words, weights, sizeof words);
        numbers[0] = (Register)(words << 16);
        numbers[1] = (Register)(words & 0xffff0000u);
    }
};

template <typename Type>
struct WideningProduct {
    using Number = Type;
    using Run = Weights<Number>;
    static constexpr bool SHARES_TOKENS = false, ADDS_RANK_ROWS = false;
    static constexpr Index TILE_PANELS = 3;
    static constexpr int MOST_TOKENS = HAS_MANY_REGISTERS ? 8 : 4, MOST_BY_A_PANEL = HAS_MANY_REGISTERS ? 16 : 4;
    static constexpr int RUN = Run::RUN;
    const float* x;
    Index num_tokens, d_in, x_stride;

    explicit WideningProduct(const Tokens& tokens) : num_tokens(tokens.num_tokens), d_in(tokens.d_in) {
        const bool is_wide = std::is_same_v<Number, float>;
        x = is_wide ? static_cast<const float*>(tokens.x) : widened(tokens);
        x_stride = is_wide ? tokens.x_stride : d_in;
    }

    Index unit() const { return takes_single_panels(*this) ? 1 : TILE_PANELS; }

    void panels(const LinearPart& part, Index first, Index count) const { few_by_few(*this, part, first, count); }

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        constexpr int FOURS = (TOKENS + 3) / 4;
        const Index num_runs = d_in / RUN, panel_bytes = d_in * PANEL * static_cast<Index>(sizeof(Number));
        const Number* weights = static_cast<const Number*>(part.weights) + panel * d_in * PANEL;
        const float* fours[FOURS];
#pragma GCC unroll 4
        for (int four = 0; four < FOURS; ++four) {
            fours[four] = x + (token + 4 * four) * x_stride;
            asm("" : "+r"(fours[four]));  // else the compiler keeps the addresses of all tokens
        }
        const Index strides[] = {0, x_stride, 2 * x_stride, 3 * x_stride};
        LinesAhead ahead;
        if constexpr (PANELS > 1) {
            const Index num_steps = (num_runs + STEP - 1) / STEP;
            ahead = panels_ahead(*this, token, weights + PANELS * d_in * PANEL, PANELS * panel_bytes, num_steps);
        }
        Register sums[TOKENS][PANELS][PIECES] = {};
        for (Index step = 0; step < num_runs; step += STEP) {
            ahead.ask();
#pragma GCC unroll 2
            for (Index run = step; run < std::min(step + STEP, num_runs); ++run)
#pragma GCC unroll 2
                for (int piece = 0; piece < PIECES; ++piece) {
                    const auto of_panel = [&](int p) {
                        const Number* here = weights + (p * num_runs + run) * RUN * PANEL + piece * RUN * WIDTH;
                        if (token == 0)
                            prefetch_panel<PANELS == 1>(here, panel_bytes - (run + 1) * RUN * PANEL * sizeof(Number),
                                                        panel_bytes, PANELS);
                        return Run(here);
                    };
                    add_run(sums, piece, fours, strides, RUN * run, of_panel);
                }
        }
        for (int t = 0; t < TOKENS; ++t)
            for (int p = 0; p < PANELS; ++p) {
                Lanes all;
                std::memcpy(&all, sums[t][p], sizeof all);
                finish<Number>(all, part, token + t, (panel + p) * PANEL);
            }
    }

private:
    static constexpr Index STEP = 16;  // runs

    // The tokens in float32 [num_tokens, d_in], until this thread's next product.
    static const float* widened(const Tokens& tokens) {
        static thread_local Lines<float> kept;  // a step has hundreds of products
        float* wide = kept.make_room(tokens.num_tokens * tokens.d_in);
        const auto* x = static_cast<const Number*>(tokens.x);
        parallel_ranges(tokens.num_tokens, tokens.num_tokens * tokens.d_in, [&](Index begin, Index end) {
            for (Index token = begin; token < end; ++token)
#pragma omp simd
                for (Index i = 0; i < tokens.d_in; ++i)
                    wide[token * tokens.d_in + i] = to_float(x[token * tokens.x_stride + i]);
        });
        return wide;
    }

    // Adds the inputs of each token with the weights of a piece of each panel.
    template <int TOKENS, int PANELS, typename OfPanel>
    static void add_run(Register (&sums)[TOKENS][PANELS][PIECES], int piece, const float* const* fours, const Index* strides,
                        Index input, const OfPanel& of_panel) {
        Register panels[PANELS][RUN];
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) {
            const Run weights = of_panel(p);
#pragma GCC unroll 2
            for (int i = 0; i < RUN; ++i) panels[p][i] = weights.numbers[i];
        }
#pragma GCC unroll 16
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 2
            for (int i = 0; i < RUN; ++i) {
                const float number = fours[t / 4][strides[t % 4] + input + i];
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) sums[t][p][piece] += number * panels[p][i];
            }
    }
};

#endif
