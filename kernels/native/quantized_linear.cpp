// y = x W^T + b for weights of 8 or 4 bits, with inputs that are brought to 8 bits on the way.
//
//     w = s (l - m)   levels l = 0 .. 2 m - 1 without sign, m = 128 or 8; a scale s (bfloat16) per 32 inputs of an output
//     x = t k         levels k = -127 .. 127; a scale t (float32) per 32 inputs of a token
//     y = sum over groups of s t (sum l k - m sum k)
//
// The sums of a group are exact integers, which is what the processor's product of four bytes at a time gives. Packed:
// panels of 16 outputs; in a panel, for each group, for each four inputs, the 16 outputs' levels: [d_out / 16][d_in / 32]
// [8][16][4]. With 4 bits a byte holds one input's level in its low half and the one's four inputs later in its high half:
// [4][16][4]. Scales: [d_out / 16][d_in / 32][16]. A tile of 4 tokens by 3 panels keeps 12 sums of a group and 12 of all.

#include "lanes.h"
#include "panels.h"
#include "tokens.h"

#include <vector>

#ifdef __AVX512VNNI__
#include <immintrin.h>

constexpr Index GROUP = 32;       // inputs that share a scale
constexpr float LEAST = 1e-30f;  // a group with nothing as large is zeros: 127 / largest would overflow

// The tokens in 8 bits.
struct QuantizedTokens {
    std::vector<int8_t> levels;  // [num_tokens, d_in]
    std::vector<float> scales;   // [num_tokens, num_groups]
    std::vector<int32_t> sums;   // [num_tokens, num_groups], of the levels
};

// Numbers that are not finite make the group's scale not finite, and so every output of the token.
template <typename Number>
static inline void quantize_group(const Number* x, int8_t* levels, float* scale, int32_t* sum) {
    const __m512 low = (__m512)load_lanes(x), high = (__m512)load_lanes(x + LANES);
    // As integers, magnitudes are in the order of the numbers; infinity and what is not a number come last.
    const __m512i magnitudes = _mm512_max_epi32((__m512i)_mm512_abs_ps(low), (__m512i)_mm512_abs_ps(high));
    const int32_t bits = _mm512_reduce_max_epi32(magnitudes);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const bool has_levels = largest >= LEAST && largest < INFINITY;
    const __m512 inverse = _mm512_set1_ps(has_levels ? 127.0f / largest : 0.0f);
    const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i last = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels), _mm512_cvtepi32_epi8(first));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(levels + LANES), _mm512_cvtepi32_epi8(last));
    *scale = largest / 127.0f;
    *sum = has_levels ? _mm512_reduce_add_epi32(_mm512_add_epi32(first, last)) : 0;
}

template <typename Number>
static void quantize(const Tokens& tokens, QuantizedTokens& result) {
    const Index num_groups = tokens.d_in / GROUP;
    result.levels.resize(tokens.num_tokens * tokens.d_in);
    result.scales.resize(tokens.num_tokens * num_groups);
    result.sums.resize(tokens.num_tokens * num_groups);
    parallel_ranges(tokens.num_tokens, tokens.num_tokens * tokens.d_in, [&](Index begin, Index end) {
        for (Index token = begin; token < end; ++token) {
            const Number* x = static_cast<const Number*>(tokens.x) + token * tokens.x_stride;
            for (Index group = 0, place = token * num_groups; group < num_groups; ++group, ++place)
                quantize_group(x + group * GROUP, &result.levels[place * GROUP], &result.scales[place],
                               &result.sums[place]);
        }
    });
}

template <int BITS, typename Number>
struct ByteProduct {
    static constexpr int MOST_TOKENS = 4;
    static constexpr int MIDDLE = 1 << (BITS - 1);
    static constexpr Index STEPS = BITS;  // loads of 64 bytes per group and panel
    static constexpr Index GROUP_BYTES = GROUP * PANEL * BITS / 8;
    const QuantizedTokens& tokens;
    Index num_tokens, d_in;

    template <int TOKENS, int PANELS>
    void tile(const LinearPart& part, Index token, Index panel) const {
        const Index num_groups = d_in / GROUP, panel_bytes = num_groups * GROUP_BYTES;
        const uint8_t* weights = static_cast<const uint8_t*>(part.weights) + panel * panel_bytes;
        const auto* scales = static_cast<const BFloat16*>(part.scales) + panel * num_groups * PANEL;
        Lanes totals[TOKENS][PANELS] = {};
        for (Index group = 0; group < num_groups; ++group) {
            __m512i sums[TOKENS][PANELS];
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p)
                    sums[t][p] = _mm512_set1_epi32(-MIDDLE * tokens.sums[(token + t) * num_groups + group]);
            const int8_t* inputs = &tokens.levels[token * d_in + group * GROUP];
#pragma GCC unroll 8
            for (Index step = 0; step < STEPS; ++step) {
                __m512i levels[PANELS];
#pragma GCC unroll 3
                for (int p = 0; p < PANELS; ++p) {
                    const uint8_t* here = weights + p * panel_bytes + group * GROUP_BYTES + step * 64;
                    levels[p] = _mm512_loadu_si512(here);
                    if (token == 0)
                        prefetch_panel(here, panel_bytes - group * GROUP_BYTES - (step + 1) * 64, panel_bytes, PANELS);
                }
                add_step<TOKENS, PANELS>(sums, levels, inputs, step);
            }
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) {
                const Lanes scale = load_lanes(scales + (p * num_groups + group) * PANEL);
#pragma GCC unroll 4
                for (int t = 0; t < TOKENS; ++t)
                    totals[t][p] += (Lanes)_mm512_cvtepi32_ps(sums[t][p]) *
                                    (scale * tokens.scales[(token + t) * num_groups + group]);
            }
        }
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t)
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) finish<Number>(totals[t][p], part, token + t, (panel + p) * PANEL);
    }

    // The four inputs of a step, or the eight whose levels share its bytes.
    template <int TOKENS, int PANELS>
    void add_step(__m512i (&sums)[TOKENS][PANELS], const __m512i* levels, const int8_t* inputs, Index step) const {
        if constexpr (BITS == 8) return add_four(sums, levels, inputs + 4 * step);
        const __m512i low_half = _mm512_set1_epi8(15);
        __m512i low[PANELS], high[PANELS];
#pragma GCC unroll 3
        for (int p = 0; p < PANELS; ++p) {
            low[p] = _mm512_and_si512(levels[p], low_half);
            high[p] = _mm512_and_si512(_mm512_srli_epi16(levels[p], 4), low_half);
        }
        add_four(sums, low, inputs + 8 * step);
        add_four(sums, high, inputs + 8 * step + 4);
    }

    template <int TOKENS, int PANELS>
    void add_four(__m512i (&sums)[TOKENS][PANELS], const __m512i* levels, const int8_t* inputs) const {
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
            int four;
            std::memcpy(&four, inputs + t * d_in, sizeof four);
            const __m512i all = _mm512_set1_epi32(four);
#pragma GCC unroll 3
            for (int p = 0; p < PANELS; ++p) sums[t][p] = _mm512_dpbusd_epi32(sums[t][p], levels[p], all);
        }
    }
};

template <int BITS, typename Number>
static void quantized_linear(const Tokens& tokens, const LinearPart* parts, Index num_parts) {
    static thread_local QuantizedTokens quantized;  // kept: a step has hundreds of products
    QuantizedTokens& here = quantized;
    quantize<Number>(tokens, here);
    multiply(ByteProduct<BITS, Number>{here, tokens.num_tokens, tokens.d_in}, parts, num_parts);
}

extern "C" int has_quantized_linear() { return 1; }

#else

template <int BITS, typename Number>
static void quantized_linear(const Tokens&, const LinearPart*, Index) {}

extern "C" int has_quantized_linear() { return 0; }

#endif

extern "C" {
void int8_linear_f32(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    quantized_linear<8, float>(*tokens, parts, num_parts);
}
void int8_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    quantized_linear<8, BFloat16>(*tokens, parts, num_parts);
}
void int4_linear_f32(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    quantized_linear<4, float>(*tokens, parts, num_parts);
}
void int4_linear_bf16(const Tokens* tokens, const LinearPart* parts, Index num_parts) {
    quantized_linear<4, BFloat16>(*tokens, parts, num_parts);
}
}
