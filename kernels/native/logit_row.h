// A row of logits, by 16 tokens at a time.
#pragma once

#include "lanes.h"

#include <algorithm>

typedef double WideLanes __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t IntLanes __attribute__((vector_size(LANES * sizeof(int32_t))));

static inline WideLanes widen(Lanes lanes) { return __builtin_convertvector(lanes, WideLanes); }

static inline double sum_of(WideLanes lanes) {
    double sum = 0;
    for (Index i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

static inline Index count_of(IntLanes truths) {  // each is 0 or -1
    Index count = 0;
    for (Index i = 0; i < LANES; ++i) count -= truths[i];
    return count;
}

template <typename Number>
class LogitRow {
public:
    LogitRow(const Number* logits, Index vocab) : logits_(logits), vocab_(vocab) {
        Lanes largest = Lanes{} - INFINITY, smallest = Lanes{} + INFINITY;
        IntLanes bad = {};
        for (Index first = 0; first < vocab; first += LANES) {
            const Lanes here = from(first);
            largest = here > largest ? here : largest;
            smallest = (here < smallest) & (here > -INFINITY) ? here : smallest;
            bad |= here != here;
        }
        for (Index i = 0; i < LANES; ++i)
            largest_ = std::max(largest_, largest[i]), smallest_ = std::min(smallest_, smallest[i]);
        is_finite_ = count_of(bad) == 0 && std::abs(largest_) < INFINITY;
    }

    // Of 16 tokens; of those behind the last one -infinity.
    Lanes from(Index first) const {
        if (first + LANES <= vocab_) return load_lanes(logits_ + first);
        Lanes lanes = Lanes{} - INFINITY;
        for (Index i = first; i < vocab_; ++i) lanes[i - first] = to_float(logits_[i]);
        return lanes;
    }

    float of(Index token) const { return to_float(logits_[token]); }

    Index vocab() const { return vocab_; }

    // True if all are numbers and the largest is finite. The smallest is that of those above -infinity.
    bool is_finite() const { return is_finite_; }
    float largest() const { return largest_; }
    float smallest() const { return smallest_; }

private:
    const Number* logits_;
    Index vocab_;
    float largest_ = -INFINITY, smallest_ = INFINITY;
    bool is_finite_;
};
