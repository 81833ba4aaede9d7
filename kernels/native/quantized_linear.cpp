// y = x W^T + b for weights of 8 or 4 bits, with inputs that are brought to 8 bits on the way.
//
//     w = s (l - m)   levels l = 0 .. 2 m - 1 without sign, m = 128 or 8; a scale s (bfloat16) per 32 inputs of an output
//     x = t k         levels k = -127 .. 127; a scale t (float32) per 32 inputs of a token
//     y = sum over groups of s t (sum l k - m sum k)
//
// The sums of a group are exact integers, which is what products of four bytes at a time give (bytes.h). Packed:
// panels of 16 outputs; in a panel, for each group, for each four inputs, the 16 outputs' levels: [d_out / 16][d_in / 32]
// [8][16][4]. With 4 bits a byte holds one input's level in its low half and the one's four inputs later in its high half:
// [4][16][4]. Scales: [d_out / 16][d_in / 32][16]. A tile of 4 tokens by 3 panels keeps 12 sums of a group and 12 of all, one
// of 8 tokens by a panel 8 and 8.

#include "bytes.h"
#include "lines.h"
#include "panels.h"
#include "threads.h"
#include "tokens.h"

#ifdef HAS_BYTE_PRODUCTS

constexpr float LEAST = 1e-30f;  // a group with nothing as large is zeros: 127 / largest would overflow

// The tokens in 8 bits.
struct QuantizedTokens {
    Lines<int8_t> levels;  // [num_tokens, d_in]
    Lines<float> scales;   // [num_tokens, num_groups]
    Lines<int32_t> sums;   // [num_tokens, num_groups], of the levels
};

// Numbers that are not finite make the group's scale not finite, and so every output of the token.
template <typename Number>
static inline void quantize_group(const Number* x, int8_t* levels, float* scale, int32_t* sum) {
    // As integers, magnitudes are in the order of the numbers; infinity and what is not a number come last.
    float numbers[GROUP];
    int32_t largest_bits = 0;
    for (Index i = 0; i < GROUP; ++i) {
        numbers[i] = to_float(x[i]);
        int32_t bits;
        std::memcpy(&bits, &numbers[i], sizeof bits);
        largest_bits = std::max(largest_bits, bits & 0x7fffffff);
    }
    float largest;
    std::memcpy(&largest, &largest_bits, sizeof largest);
    const bool has_levels = largest >= LEAST && largest < INFINITY;
    const float inverse = has_levels ? 127.0f / largest : 0.0f;
    int32_t total = 0;
    for (Index i = 0; i < GROUP; ++i) {
        const auto level = static_cast<int32_t>(std::nearbyint(has_levels ? numbers[i] * inverse : 0.0f));
        levels[i] = static_cast<int8_t>(level);
        total += level;
    }
    *scale = largest / 127.0f;
    *sum = total;
}

template <typename Number>
static void quantize(const Tokens& tokens, QuantizedTokens& result) {
    const Index num_groups = tokens.d_in / GROUP;
    int8_t* levels = result.levels.make_room(tokens.num_tokens * tokens.d_in);
    float* scales = result.scales.make_room(tokens.num_tokens * num_groups);
    int32_t* sums = result.sums.make_room(tokens.num_tokens * num_groups);
    parallel_ranges(tokens.num_tokens, tokens.num_tokens * tokens.d_in, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) {
            const Number* x = static_cast<const Number*>(tokens.x) + token * tokens.x_stride;
            for (Index group = 0, place = token * num_groups; group < num_groups; ++group, ++place)
                quantize_group(x + group * GROUP, levels + place * GROUP, scales + place, sums + place);
        }
    });
}

template <int BITS, typename Type>
struct ByteProduct {
    using Number = Type;
    static constexpr bool SHARES_TOKENS = false, ADDS_RANK_ROWS = false;
    static constexpr Index TILE_PANELS = 3;
    static constexpr int MOST_TOKENS = 4, MOST_BY_A_PANEL = HAS_MANY_REGISTERS ? 8 : 4;
    static constexpr Index STEPS = BITS;  // loads of 64 bytes per group and panel
    static constexpr Index GROUP_BYTES = GROUP * PANEL * BITS / 8;
    const QuantizedTokens& tokens;
    Index num_tokens, d_in;

    Index unit() const { return takes_single_panels(*this) ? 1 : TILE_PANELS; }

    void panels(const LinearPart& part, Index first, Index count) const { few_by_few(*this, part, first, count); }

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        const Index num_groups = d_in / GROUP, panel_bytes = num_groups * GROUP_BYTES;
        const uint8_t* weights = static_cast<const uint8_t*>(part.weights) + panel * panel_bytes;
        const auto* scales = static_cast<const BFloat16*>(part.scales) + panel * num_groups * PANEL;
        Totals totals[TOKENS][PANELS] = {};
        for (Index group = 0; group < num_groups; ++group) {
            Sums sums[TOKENS][PANELS];
#pragma GCC unroll 8
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p)
                    sums[t][p] = first_sums<BITS>(tokens.sums.data()[(token + t) * num_groups + group]);
            const int8_t* inputs = tokens.levels.data() + token * d_in + group * GROUP;
#pragma GCC unroll 8
            for (Index step = 0; step < STEPS; ++step) {
                Levels levels[PANELS];
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) {
                    const uint8_t* here = weights + p * panel_bytes + group * GROUP_BYTES + step * 64;
                    levels[p] = load_levels(here);
                    if (token == 0)
                        prefetch_panel<PANELS == 1>(here, panel_bytes - group * GROUP_BYTES - (step + 1) * 64, panel_bytes,
                                                    PANELS);
                }
                add_step(sums, levels, inputs, step);
            }
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) {
                const Totals scale = load_scales(scales + (p * num_groups + group) * PANEL);
#pragma GCC unroll 8
                for (int t = 0; t < TOKENS; ++t)
                    totals[t][p] = add_scaled(totals[t][p], sums[t][p], scale,
                                              tokens.scales.data()[(token + t) * num_groups + group]);
            }
        }
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p)
                finish<Number>(to_lanes(totals[t][p]), part, token + t, (panel + p) * PANEL);
    }

    // The four inputs of a step, or the eight whose levels share its bytes.
    template <int TOKENS, int PANELS>
    void add_step(Sums (&sums)[TOKENS][PANELS], const Levels* levels, const int8_t* inputs, Index step) const {
        if constexpr (BITS == 8) return add_four(sums, levels, inputs + 4 * step);
        Levels lower[PANELS], upper[PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) {
            lower[p] = lower_halves(levels[p]);
            upper[p] = upper_halves(levels[p]);
        }
        add_four(sums, lower, inputs + 8 * step);
        add_four(sums, upper, inputs + 8 * step + 4);
    }

    template <int TOKENS, int PANELS>
    void add_four(Sums (&sums)[TOKENS][PANELS], const Levels* levels, const int8_t* inputs) const {
#pragma GCC unroll 8
        for (int t = 0; t < TOKENS; ++t) {
            int four;
            std::memcpy(&four, inputs + t * d_in, sizeof four);
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) sums[t][p] = add_products<BITS>(sums[t][p], levels[p], four);
        }
    }
};

template <int BITS, typename Number>
static void quantized_linear(const Tokens& tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    static thread_local QuantizedTokens quantized;  // kept: a step has hundreds of products
    QuantizedTokens& here = quantized;
    quantize<Number>(tokens, here);
    multiply(ByteProduct<BITS, Number>{here, tokens.num_tokens, tokens.d_in}, parts, num_parts, after);
}

extern "C" int has_quantized_linear() { return 1; }

#else

template <int BITS, typename Number>
static void quantized_linear(const Tokens&, const LinearPart*, Index, const AfterPair*) {}

extern "C" int has_quantized_linear() { return 0; }

#endif

extern "C" {
void int8_linear_f32(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    quantized_linear<8, float>(*tokens, parts, num_parts, after);
}
void int8_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    quantized_linear<8, BFloat16>(*tokens, parts, num_parts, after);
}
void int8_linear_f16(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    quantized_linear<8, Float16>(*tokens, parts, num_parts, after);
}
void int4_linear_f32(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    quantized_linear<4, float>(*tokens, parts, num_parts, after);
}
void int4_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    quantized_linear<4, BFloat16>(*tokens, parts, num_parts, after);
}
void int4_linear_f16(const Tokens* tokens, const LinearPart* parts, Index num_parts, const AfterPair* after) {
    quantized_linear<4, Float16>(*tokens, parts, num_parts, after);
}
}
