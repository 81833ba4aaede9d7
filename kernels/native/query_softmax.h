// The softmax of up to 16 queries over a stretch, side by side: a query's largest score, its sum and how much it shrinks take
// a register's lane each, because a chain of their own for every query is what takes long.
#pragma once

#include "attention_stretch.h"
#include "lanes.h"

#ifdef __AVX512BF16__

constexpr Index QUERIES_TOGETHER = 16;
constexpr Index STRETCH_SLOTS = STRETCH_TILES * TILE;
constexpr float MOST_GROWTH = 8;

using QueryScores = float[QUERIES_TOGETHER][STRETCH_SLOTS];
using QueryWeights = BFloat16[QUERIES_TOGETHER][STRETCH_SLOTS];

// result[i] = the lanes of rows[i], combined in a tree that is the same for all: first halves, last neighbours.
template <typename Combine>
static inline Lanes combine_rows(const Lanes (&rows)[LANES], const Combine& combine) {
    __m512 some[LANES];
    for (int r = 0; r < 16; ++r) some[r] = (__m512)rows[r];
    for (int r = 0; r < 8; ++r)
        some[r] = combine(_mm512_shuffle_f32x4(some[r], some[r + 8], 0x44), _mm512_shuffle_f32x4(some[r], some[r + 8], 0xee));
    for (int r = 0; r < 4; ++r)
        some[r] = combine(_mm512_shuffle_f32x4(some[r], some[r + 4], 0x88), _mm512_shuffle_f32x4(some[r], some[r + 4], 0xdd));
    for (int r = 0; r < 2; ++r) {
        const __m512d a = _mm512_castps_pd(some[r]), b = _mm512_castps_pd(some[r + 2]);
        some[r] = combine(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    const __m512 all = combine(_mm512_shuffle_ps(some[0], some[1], 0x88), _mm512_shuffle_ps(some[0], some[1], 0xdd));
    const __m512i places = _mm512_setr_epi32(0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15);
    return (Lanes)_mm512_permutexvar_ps(places, all);
}

// 2^x to 3e-6 of itself, a thousandth of what rounding to bfloat16 takes: 2^floor(x) times a polynomial of what is left.
// 0 below 2^-126: making numbers smaller than that takes the processor many times as long.
static inline Lanes power_of_two(Lanes x) {
    const __m512 least = _mm512_set1_ps(-126.0f), bounded = _mm512_max_ps(least, (__m512)x);
    const __mmask16 is_normal = _mm512_cmp_ps_mask((__m512)x, least, _CMP_NLT_UQ);
    const Lanes rest = (Lanes)_mm512_reduce_ps(bounded, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    Lanes result = rest * 1.353416778e-2f + 5.201146379e-2f;
    result = result * rest + 2.414427549e-1f;
    result = result * rest + 6.930038333e-1f;
    result = result * rest + 1.000002623f;
    return (Lanes)_mm512_maskz_scalef_ps(is_normal, (__m512)result, bounded);
}

// Scores of slots that a query does not attend to, or that are not there, become -infinity.
static inline void mask_scores(const Stretch& stretch, const Query<BFloat16>& query, float* scores) {
    for (Index k = 0; k < STRETCH_TILES; ++k) {
        const Index here = k < stretch.num_tiles ? stretch.positions[k] : query.end;
        const Index num_rows = k < stretch.num_tiles ? stretch.num_rows[k] : 0;
        const Index begin = query.begin - here, end = std::min(query.end - here, num_rows);
        store_lanes(keep_lanes(load_lanes(scores + k * TILE), begin, end, -INFINITY), scores + k * TILE);
    }
}

// True if all slots of a whole stretch are the query's.
static inline bool attends_to_all(const Stretch& stretch, const Query<BFloat16>& query) {
    return query.begin <= stretch.positions[0] && stretch.is_whole && query.end >= stretch.positions[0] + STRETCH_SLOTS;
}

// Scores become weights 2^(scale score - maximum), rounded, 0 outside the query's positions; `shrinks` is how much the sums so
// far shrink. What `weigh` does query by query, but a maximum stays while weights are below 2^MOST_GROWTH, so that sums seldom
// shrink.
static inline void weigh_queries(const Attention& a, const Stretch& stretch, const Query<BFloat16>* queries, Index count,
                                 QueryScores& scores, QueryWeights& weights, float* shrinks) {
    const float scale = a.scale * 1.44269504f;  // to powers of two
    Lanes rows[QUERIES_TOGETHER] = {}, before = {}, totals = {};
    for (Index q = 0; q < count; ++q) {
        if (a.softcap > 0) cap_scores(a, stretch, scores[q]);
        if (!attends_to_all(stretch, queries[q])) mask_scores(stretch, queries[q], scores[q]);
        Lanes largest = load_lanes(scores[q]);
        for (Index k = 1; k < STRETCH_TILES; ++k) {
            const Lanes here = load_lanes(scores[q] + k * TILE);
            largest = here > largest ? here : largest;
        }
        rows[q] = largest;
        before[q] = queries[q].head->maximum;
        totals[q] = queries[q].head->total;
    }
    const Lanes largest = scale * combine_rows(rows, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    const Lanes maxima = largest > before + MOST_GROWTH ? largest : before;
    const Lanes shrink = before == -INFINITY ? Lanes{} + 1.0f : power_of_two(before - maxima);  // of nothing
    const __m512bh ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(1), _mm512_set1_ps(1));
    for (Index q = 0; q < count; ++q) {
        __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 2
        for (Index k = 0; k < STRETCH_TILES; k += 2) {
            const Lanes low = power_of_two(load_lanes(scores[q] + k * TILE) * scale - maxima[q]);
            const Lanes high = power_of_two(load_lanes(scores[q] + (k + 1) * TILE) * scale - maxima[q]);
            const __m512bh pair = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
            std::memcpy(weights[q] + k * TILE, &pair, sizeof pair);
            sum = _mm512_dpbf16_ps(sum, pair, ones);
        }
        rows[q] = (Lanes)sum;
    }
    totals = totals * shrink + combine_rows(rows, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
    store_lanes(shrink, shrinks);
    for (Index q = 0; q < count; ++q) {
        queries[q].head->maximum = maxima[q];
        queries[q].head->total = totals[q];
    }
}

#endif
