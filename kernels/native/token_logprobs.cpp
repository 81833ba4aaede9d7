// Log-probabilities of tokens, their ranks, and the most likely others: log softmax of rows of logits, without a copy of it.

#include "logit_row.h"
#include "threads.h"

#include <functional>
#include <utility>
#include <vector>

namespace {

// As in Python: which token of which row, and where its results go.
struct TokenLogprobs {
    Index row, token;
    float* logprob;
    Index* rank;       // 1 for the most likely one
    float* top;        // the log-probabilities of the most likely tokens, in descending order
    Index* top_tokens;
};

using Ranked = std::pair<float, Index>;  // a logit, and the token's number below 0, so that of ties the first comes first

template <typename Number>
class Ranking {
public:
    explicit Ranking(const LogitRow<Number>& logits) : logits_(logits) {}

    void tell(const TokenLogprobs& wanted, Index num_top) {
        if (!logits_.is_finite()) return tell_nothing(wanted, num_top);
        const float chosen = logits_.of(wanted.token);
        WideLanes sums = {};
        Index num_above = 0;
        for (Index first = 0; first < logits_.vocab(); first += LANES) {
            const Lanes here = logits_.from(first);
            sums += widen(exp_lanes(here - logits_.largest()));
            num_above += count_of(here > chosen);
            if (num_top > 0) rank(here, first, num_top);
        }
        const double log_sum = std::log(sum_of(sums));
        const auto logprob = [&](float logit) { return float(double(logit) - logits_.largest() - log_sum); };
        *wanted.logprob = logprob(chosen);
        *wanted.rank = num_above + 1;
        std::sort_heap(likely_.begin(), likely_.end(), std::greater<Ranked>());
        for (Index i = 0; i < num_top; ++i) {
            wanted.top[i] = logprob(likely_[i].first);
            wanted.top_tokens[i] = -likely_[i].second;
        }
    }

private:
    void tell_nothing(const TokenLogprobs& wanted, Index num_top) {
        *wanted.logprob = NAN, *wanted.rank = 1;
        for (Index i = 0; i < num_top; ++i) wanted.top[i] = NAN, wanted.top_tokens[i] = i;
    }

    // Keeps the most likely tokens so far, the least likely of them first.
    void rank(Lanes here, Index first, Index num_top) {
        const bool is_full = Index(likely_.size()) == num_top;
        if (is_full && count_of(here > likely_.front().first) == 0) return;
        for (Index i = 0; i < std::min(LANES, logits_.vocab() - first); ++i) {
            const Ranked token(here[i], -(first + i));
            if (Index(likely_.size()) == num_top) {
                if (token <= likely_.front()) continue;
                std::pop_heap(likely_.begin(), likely_.end(), std::greater<Ranked>());
                likely_.pop_back();
            }
            likely_.push_back(token);
            std::push_heap(likely_.begin(), likely_.end(), std::greater<Ranked>());
        }
    }

    const LogitRow<Number>& logits_;
    std::vector<Ranked> likely_;
};

// `num_top` is at most the vocabulary.
template <typename Number>
void token_logprobs(const Number* logits, Index vocab, const TokenLogprobs* wanted, Index count, Index num_top) {
    parallel(count, [&](Index place) {
        const LogitRow<Number> row(logits + wanted[place].row * vocab, vocab);
        Ranking<Number>(row).tell(wanted[place], num_top);
    });
}

}  // namespace

extern "C" {
void token_logprobs_f32(const float* logits, Index vocab, const TokenLogprobs* wanted, Index count, Index num_top) {
    token_logprobs(logits, vocab, wanted, count, num_top);
}
void token_logprobs_bf16(const BFloat16* logits, Index vocab, const TokenLogprobs* wanted, Index count, Index num_top) {
    token_logprobs(logits, vocab, wanted, count, num_top);
}
void token_logprobs_f16(const Float16* logits, Index vocab, const TokenLogprobs* wanted, Index count, Index num_top) {
    token_logprobs(logits, vocab, wanted, count, num_top);
}
}
