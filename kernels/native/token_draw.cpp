// Draws a row's next token from its logits: temperature, top-k, top-p and min-p, then a descent by random numbers.
//
// Nothing is sorted but the few tokens that lie where a cut goes through: all are counted and weighed by bins of their
// logits, and the cut is looked for in one bin. Weights are e^((logit - largest) / temperature), so the largest is 1.
// `token_draw.py` has the same in torch's operations, as the definition.

#include "lanes.h"
#include "threads.h"

#include <algorithm>
#include <functional>
#include <vector>

namespace {

constexpr int NUM_UNIFORMS = 7;
constexpr Index FANOUT = 8, BLOCK = FANOUT * FANOUT * FANOUT;  // tokens whose weights are summed at once
constexpr int NUM_BINS = 1024;
constexpr float LEAST_DEPTH = 1e-3f, MOST_DEPTH = 40.0f;  // of the bins; tokens below share the last one

typedef double WideLanes __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t IntLanes __attribute__((vector_size(LANES * sizeof(int32_t))));

// As in Python. `top_k` is 0 for all tokens.
struct TokenDraw {
    Index row, top_k;
    double temperature, top_p, min_p;
    double uniforms[NUM_UNIFORMS];
};

struct Token {
    float logit, weight;
};

// The tokens in the bins before `bin`, and those in it from the logit `lowest` on.
struct Kept {
    Index bin;
    float lowest;
    double weight;  // of all of them
};

template <typename Number>
class Row {
public:
    Row(const Number* logits, Index vocab, double temperature)
        : logits_(logits), vocab_(vocab), temperature_(static_cast<float>(temperature)) {}

    // The token, or -1 if a logit is not a number or the largest is not finite.
    Index draw(const TokenDraw& how) {
        if (!find_largest()) return -1;
        Kept kept{NUM_BINS - 1, -INFINITY, 0};
        const bool has_top_k = how.top_k > 0 && how.top_k < vocab_, has_top_p = how.top_p < 1;
        if (has_top_k || has_top_p) {
            fill_bins();
            for (const double sum : weights_) kept.weight += sum;
        }
        if (has_top_k) kept = most_likely(how.top_k);
        if (has_top_p) kept = most_probable(how.top_p * kept.weight, kept);
        least_depth_ = how.min_p > 0 ? std::log(static_cast<float>(how.min_p)) : -INFINITY;
        lowest_ = kept.lowest;
        return descend(how.uniforms);
    }

private:
    bool find_largest() {
        Lanes largest = Lanes{} - INFINITY, smallest = Lanes{} + INFINITY;
        IntLanes num_bad = {};
        for (Index i = 0; i < vocab_; i += LANES) {
            const Lanes here = logits(i);
            largest = here > largest ? here : largest;
            smallest = (here < smallest) & (here > -INFINITY) ? here : smallest;
            num_bad -= here != here;
        }
        largest_ = largest[0], smallest_ = smallest[0];
        int bad = 0;
        for (Index i = 0; i < LANES; ++i) {
            largest_ = std::max(largest_, largest[i]), smallest_ = std::min(smallest_, smallest[i]);
            bad += num_bad[i];
        }
        return bad == 0 && std::abs(largest_) < INFINITY;
    }

    // Of 16 tokens; of those behind the last one -infinity.
    Lanes logits(Index first) const {
        if (first + LANES <= vocab_) return load_lanes(logits_ + first);
        Lanes lanes = Lanes{} - INFINITY;
        for (Index i = first; i < vocab_; ++i) lanes[i - first] = to_float(logits_[i]);
        return lanes;
    }

    // At most 0.
    Lanes scaled(Lanes logits) const { return (logits - largest_) / temperature_; }

    IntLanes bins(Lanes scaled) const {
        const Lanes place = -scaled * bins_per_unit_, last = Lanes{} + float(NUM_BINS - 1);
        return __builtin_convertvector(place < last ? place : last, IntLanes);
    }

    void fill_bins() {
        const float depth = -(smallest_ - largest_) / temperature_;
        bins_per_unit_ = NUM_BINS / std::clamp(depth, LEAST_DEPTH, MOST_DEPTH);
        std::fill_n(counts_, NUM_BINS, 0);
        std::fill_n(weights_, NUM_BINS, 0.0);
        for (Index first = 0; first < vocab_; first += LANES) {
            const Lanes depths = scaled(logits(first)), weights = exp_lanes(depths);
            const IntLanes places = bins(depths);
            for (Index i = 0; i < std::min(LANES, vocab_ - first); ++i) {
                ++counts_[places[i]];
                weights_[places[i]] += weights[i];
            }
        }
    }

    // The tokens of a bin with at least that logit.
    std::vector<Token>& tokens_of(Index bin, float lowest) const {
        static thread_local std::vector<Token> tokens;
        tokens.clear();
        for (Index first = 0; first < vocab_; first += LANES) {
            const Lanes here = logits(first), depths = scaled(here);
            const IntLanes is_in = (bins(depths) == static_cast<int32_t>(bin)) & (here >= lowest);
            int any = 0;
            for (Index i = 0; i < LANES; ++i) any |= is_in[i];
            if (!any) continue;
            const Lanes weights = exp_lanes(depths);
            for (Index i = 0; i < std::min(LANES, vocab_ - first); ++i)
                if (is_in[i]) tokens.push_back({here[i], weights[i]});
        }
        return tokens;
    }

    // The tokens that are no less likely than the k-th.
    Kept most_likely(Index k) const {
        Index bin = 0;
        double weight = 0;
        for (; counts_[bin] < k; ++bin) k -= counts_[bin], weight += weights_[bin];
        auto& tokens = tokens_of(bin, -INFINITY);
        const auto is_likelier = [](const Token& a, const Token& b) { return a.logit > b.logit; };
        std::nth_element(tokens.begin(), tokens.begin() + (k - 1), tokens.end(), is_likelier);
        const float lowest = tokens[k - 1].logit;
        for (const Token& token : tokens) weight += token.logit >= lowest ? token.weight : 0;
        return {bin, lowest, weight};
    }

    // Of `kept`, the smallest set of most likely tokens whose weight reaches `least`, and whoever is as likely as its last.
    Kept most_probable(double least, const Kept& kept) const {
        Index bin = 0;
        double weight = 0;
        for (; bin < kept.bin && weight + weights_[bin] < least; ++bin) weight += weights_[bin];
        auto& tokens = tokens_of(bin, bin == kept.bin ? kept.lowest : -INFINITY);
        std::sort(tokens.begin(), tokens.end(), [](const Token& a, const Token& b) { return a.logit > b.logit; });
        float lowest = kept.lowest;
        for (const Token& token : tokens) {
            if (weight >= least) break;
            lowest = token.logit, weight += token.weight;
        }
        return {bin, lowest, weight};
    }

    // Weights of 16 tokens, 0 of those that are not kept.
    Lanes kept_weights(Index first) const {
        const Lanes here = logits(first), depths = scaled(here);
        return (here >= lowest_) & (depths >= least_depth_) ? exp_lanes(depths) : Lanes{};
    }

    // Splits the range of tokens into 8 parts, again and again, and draws each by a number of its own.
    Index descend(const double* uniforms) const {
        static thread_local std::vector<double> blocks;
        blocks.clear();
        for (Index first = 0; first < vocab_; first += BLOCK) {
            WideLanes sums = {};
            for (Index i = first; i < std::min(first + BLOCK, vocab_); i += LANES)
                sums += __builtin_convertvector(kept_weights(i), WideLanes);
            double sum = 0;
            for (Index i = 0; i < LANES; ++i) sum += sums[i];
            blocks.push_back(sum);
        }
        Index width = 1, first = 0;
        while (width < vocab_) width *= FANOUT;
        for (; width > BLOCK; ++uniforms) {
            width /= FANOUT;
            const auto sum_of_part = [&](Index part) {
                const Index begin = (first + part * width) / BLOCK, end = begin + width / BLOCK, size = blocks.size();
                double sum = 0;
                for (Index block = begin; block < std::min(end, size); ++block) sum += blocks[block];
                return sum;
            };
            first += width * drawn_part(*uniforms, sum_of_part);
        }
        float weights[BLOCK] = {};
        for (Index i = 0; i < std::min(BLOCK, vocab_ - first); i += LANES)
            store_lanes(kept_weights(first + i), weights + i);
        Index place = 0;
        for (; width > 1; ++uniforms) {
            width /= FANOUT;
            const auto sum_of_part = [&](Index part) {
                double sum = 0;
                for (Index i = 0; i < width; ++i) sum += weights[place + part * width + i];
                return sum;
            };
            place += width * drawn_part(*uniforms, sum_of_part);
        }
        return first + place;
    }

    // One of the parts with a weight, as often as its share of all.
    template <typename SumOfPart>
    static Index drawn_part(double uniform, const SumOfPart& sum_of_part) {
        double sums[FANOUT], total = 0, reached = 0;
        for (Index part = 0; part < FANOUT; ++part) total += sums[part] = sum_of_part(part);
        Index drawn = 0;
        for (Index part = 0; part < FANOUT && reached <= uniform * total; ++part) {
            reached += sums[part];
            drawn = sums[part] > 0 ? part : drawn;
        }
        return drawn;
    }

    const Number* logits_;
    Index vocab_;
    float temperature_, largest_ = 0, smallest_ = 0, bins_per_unit_ = 0, lowest_ = 0, least_depth_ = 0;
    Index counts_[NUM_BINS];
    double weights_[NUM_BINS];
};

template <typename Number>
void draw_tokens(const Number* logits, Index vocab, const TokenDraw* draws, Index count, Index* tokens) {
    parallel(count, [&](Index place) {
        const TokenDraw& how = draws[place];
        tokens[place] = Row<Number>(logits + how.row * vocab, vocab, how.temperature).draw(how);
    });
}

}  // namespace

extern "C" {
void draw_tokens_f32(const float* logits, Index vocab, const TokenDraw* draws, Index count, Index* tokens) {
    draw_tokens(logits, vocab, draws, count, tokens);
}
void draw_tokens_bf16(const BFloat16* logits, Index vocab, const TokenDraw* draws, Index count, Index* tokens) {
    draw_tokens(logits, vocab, draws, count, tokens);
}
}
