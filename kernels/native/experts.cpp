// Routed experts: for each token the weighed sum of what those that were chosen for it make of it.
//
//     y = sum over chosen e of w_e down_e(activation(gate_e x) * up_e x)
//
// Experts take their tokens one expert after the other, so a token's sum is in the order of their numbers, whoever else is
// there; it is rounded once.

#include "gating.h"
#include "lines.h"
#include "projections.h"

#include <algorithm>
#include <vector>

struct Experts {
    Product product;
    const void* gate_up;  // panels [num_experts, 2 inner / 16]: of each expert gate, then up
    const void* gate_up_scales;  // of quantized weights, or null
    const void* down;  // panels [num_experts, hidden / 16]
    const void* down_scales;
    Index num_experts, hidden, inner;
    Index bits;  // of a weight
    Activation activation;
};

// Those of a batch; numbers of no expert stand for none.
struct Choices {
    const Index* experts;  // [num_tokens, per_token], each expert at most once for a token
    const float* weights;  // like experts
    Index num_tokens, per_token;
};

template <typename Number>
class ExpertPass {
public:
    ExpertPass(const Experts& experts, const Choices& choices, const Number* x, Number* y)
        : experts(experts), choices(choices), x(x), y(y) {}

    void run() {
        group();
        const Index most = *std::max_element(counts.begin(), counts.end());
        sums = sum_lines().make_room(choices.num_tokens * hidden);
        std::fill_n(sums, choices.num_tokens * hidden, 0.0f);
        rows = lines().make_room(most * (2 * hidden + inner));
        gated = rows + most * hidden;
        outputs = gated + most * inner;
        for (Index expert = 0, first = 0; expert < experts.num_experts; first += counts[expert++])
            if (counts[expert] > 0) compute(expert, &places[first], counts[expert]);
        write();
    }

private:
    static Lines<float>& sum_lines() {
        static thread_local Lines<float> kept;
        return kept;
    }

    static Lines<Number>& lines() {
        static thread_local Lines<Number> kept;
        return kept;
    }

    // Sorts the choices by expert, those of one in the order of their tokens.
    void group() {
        counts.assign(experts.num_experts, 0);
        const Index num_choices = choices.num_tokens * choices.per_token;
        for (Index place = 0; place < num_choices; ++place)
            if (is_one(choices.experts[place])) ++counts[choices.experts[place]];
        std::vector<Index> next(experts.num_experts, 0);
        for (Index expert = 1; expert < experts.num_experts; ++expert) next[expert] = next[expert - 1] + counts[expert - 1];
        places.resize(num_choices);
        for (Index place = 0; place < num_choices; ++place)
            if (is_one(choices.experts[place])) places[next[choices.experts[place]]++] = place;
    }

    bool is_one(Index expert) const { return expert >= 0 && expert < experts.num_experts; }

    // The panels of an expert's module, the first of which is that of an output.
    LinearPart part(const void* weights, const void* scales, Index output, Index d_in, Index d_out, Number* y) const {
        const void* own = static_cast<const char*>(weights) + output * d_in * experts.bits / 8;
        const void* own_scales = scales ? static_cast<const BFloat16*>(scales) + output * d_in / GROUP : nullptr;
        return {own, own_scales, nullptr, y, d_out, d_out, false, nullptr};
    }

    LinearPart gate_or_up(Index place) const {
        return part(experts.gate_up, experts.gate_up_scales, place * inner, hidden, inner, nullptr);
    }

    // Adds what an expert makes of its tokens.
    void compute(Index expert, const Index* own, Index count) {
        parallel_ranges(count, count * hidden, [&](Index begin, Index end) {
            for (Index i = begin; i < end; ++i)
                std::copy_n(x + own[i] / choices.per_token * hidden, hidden, rows + i * hidden);
        });
        const LinearPart pair[] = {gate_or_up(2 * expert), gate_or_up(2 * expert + 1)};
        const Gating gating{gated, inner, experts.activation};
        const AfterPair after{Gating::run<Number>, &gating, sizeof(Number)};
        const Tokens inputs{rows, count, hidden, hidden}, inside{gated, count, inner, inner};
        experts.product(&inputs, pair, 2, &after);
        const LinearPart down = part(experts.down, experts.down_scales, expert * hidden, inner, hidden, outputs);
        experts.product(&inside, &down, 1, nullptr);
        parallel_ranges(count, count * hidden, [&](Index begin, Index end) {
            for (Index i = begin; i < end; ++i) add(outputs + i * hidden, own[i]);
        });
    }

    void add(const Number* output, Index place) const {
        float* sum = sums + place / choices.per_token * hidden;
        const float weight = choices.weights[place];
        for (Index i = 0; i < hidden; i += LANES) store_lanes(load_lanes(sum + i) + load_lanes(output + i) * weight, sum + i);
    }

    void write() const {
        const Index count = choices.num_tokens * hidden;
        parallel_ranges(choices.num_tokens, count, [&](Index begin, Index end) {
            for (Index i = begin * hidden; i < end * hidden; i += LANES) store_lanes(load_lanes(sums + i), y + i);
        });
    }

    const Experts& experts;
    const Choices& choices;
    const Number* x;
    Number* y;
    const Index hidden = experts.hidden, inner = experts.inner;  // both multiples of 16
    std::vector<Index> counts, places;
    float* sums;
    Number *rows, *gated, *outputs;
};

extern "C" {
void experts_f32(const Experts* experts, const Choices* choices, const float* x, float* y) {
    ExpertPass<float>(*experts, *choices, x, y).run();
}
void experts_bf16(const Experts* experts, const Choices* choices, const BFloat16* x, BFloat16* y) {
    ExpertPass<BFloat16>(*experts, *choices, x, y).run();
}
void experts_f16(const Experts* experts, const Choices* choices, const Float16* x, Float16* y) {
    ExpertPass<Float16>(*experts, *choices, x, y).run();
}
}
