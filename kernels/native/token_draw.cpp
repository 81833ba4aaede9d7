// Draws a row's next token from its logits: temperature, top-k, top-p and min-p, then a descent by random numbers.
//
// Nothing is sorted but the few tokens that lie where a cut goes through: all are counted and weighed by bins of their
// logits, and the cut is looked for in one bin. Weights are e^((logit - largest) / temperature), so the largest is 1.
// `token_draw.py` has the same in torch's operations, as the definition.

#include "logit_row.h"
#include "threads.h"

#include <algorithm>
#include <vector>

namespace {

constexpr int NUM_UNIFORMS = 7;
constexpr Index FANOUT = 8, BLOCK = FANOUT * FANOUT * FANOUT;  // tokens whose weights are summed at once
constexpr int NUM_BINS = 1024;
constexpr float LEAST_DEPTH = 1e-3f, MOST_DEPTH = 40.0f;  // of the bins; tokens below share the last one

// As in Python. `top_k` is 0 for all tokens.
struct TokenDraw {
    Index row, top_k;
    double temperature, top_p, min_p;
    double uniforms[NUM_UNIFORMS];
};

struct Token {
    float logit, weight;
};

bool is_likelier(const Token& a, const Token& b) { return a.logit > b.logit; }

// The tokens in the bins before `bin`, and those in it from the logit `lowest` on.
struct Kept {
    Index bin;
    float lowest;
    double weight;  // of all of them
};

template <typename Number>
class Drawing {
public:
    Drawing(const LogitRow<Number>& logits, double temperature)
        : logits_(logits), vocab_(logits.vocab()), temperature_(static_cast<float>(temperature)) {}

    Index draw(const TokenDraw& how) {
        Kept kept{NUM_BINS - 1, -INFINITY, 0};
        const bool has_top_k = how.top_k > 0 && how.top_k < vocab_, has_top_p = how.top_p < 1;
        if (has_top_k || has_top_p) {
            fill_bins();
            for (const double sum : weights_) kept.weight += sum;
        }
        if (has_top_k) kept = most_likely(how.top_k);
        if (has_top_p) kept = most_probable(how.top_p * kept.weight, kept);
        lowest_ = kept.lowest;
        least_depth_ = how.min_p > 0 ? std::log(static_cast<float>(how.min_p)) : -INFINITY;
        return descend(how.uniforms);
    }

private:
    // At most 0.
    Lanes scaled(Lanes logits) const { return (logits - logits_.largest()) / temperature_; }

    IntLanes bins_of(Lanes scaled) const {
        const Lanes place = -scaled * bins_per_unit_, last = Lanes{} + float(NUM_BINS - 1);
        return __builtin_convertvector(place < last ? place : last, IntLanes);
    }

    void fill_bins() {
        const float depth = -(logits_.smallest() - logits_.largest()) / temperature_;
        bins_per_unit_ = NUM_BINS / std::clamp(depth, LEAST_DEPTH, MOST_DEPTH);
        std::fill_n(counts_, NUM_BINS, 0);
        std::fill_n(weights_, NUM_BINS, 0.0);
        for (Index first = 0; first < vocab_; first += LANES) {
            const Lanes depths = scaled(logits_.from(first)), weights = exp_lanes(depths);
            const IntLanes places = bins_of(depths);
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
            const Lanes here = logits_.from(first), depths = scaled(here);
            const IntLanes is_in = (bins_of(depths) == static_cast<int32_t>(bin)) & (here >= lowest);
            if (count_of(is_in) == 0) continue;
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
        std::sort(tokens.begin(), tokens.end(), is_likelier);
        float lowest = kept.lowest;
        for (const Token& token : tokens) {
            if (weight >= least) break;
            lowest = token.logit, weight += token.weight;
        }
        return {bin, lowest, weight};
    }

    // Weights of 16 tokens, 0 of those that are not kept.
    Lanes kept_weights(Index first) const {
        const Lanes here = logits_.from(first), depths = scaled(here);
        return (here >= lowest_) & (depths >= least_depth_) ? exp_lanes(depths) : Lanes{};
    }

    // Splits the range of tokens into 8 parts, again and again, and draws each by a number of its own.
    Index descend(const double* uniforms) const {
        static thread_local std::vector<double> blocks;
        blocks.clear();
        for (Index first = 0; first < vocab_; first += BLOCK) {
            WideLanes sums = {};
            for (Index i = first; i < std::min(first + BLOCK, vocab_); i += LANES)
                sums += widen(kept_weights(i));
            blocks.push_back(sum_of(sums));
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

    const LogitRow<Number>& logits_;
    Index vocab_;
    float temperature_, bins_per_unit_ = 0, lowest_ = 0, least_depth_ = 0;
    Index counts_[NUM_BINS];
    double weights_[NUM_BINS];
};

template <typename Number>
void draw_tokens(const Number* logits, Index vocab, const TokenDraw* draws, Index count, Index* tokens) {
    parallel(count, [&](Index place) {
        const TokenDraw& how = draws[place];
        const LogitRow<Number> row(logits + how.row * vocab, vocab);
        tokens[place] = row.is_finite() ? Drawing<Number>(row, how.temperature).draw(how) : -1;
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
void draw_tokens_f16(const Float16* logits, Index vocab, const TokenDraw* draws, Index count, Index* tokens) {
    draw_tokens(logits, vocab, draws, count, tokens);
}
}
