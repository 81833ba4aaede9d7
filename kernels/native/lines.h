// The lines of the processor's caches.
#pragma once

#include "number.h"

#include <algorithm>
#include <vector>

constexpr Index LINE_BYTES = 64;

// Asks for lines that are needed later, so many of them at each step.
struct LinesAhead {
    const char* line = nullptr;
    Index each = 0;

    void ask() {
        for (Index i = 0; i < each; ++i, line += LINE_BYTES) __builtin_prefetch(line, 0, 2);
    }
};

// Memory that begins with a line, so that what fills registers does not lie across two.
template <typename Number>
class Lines {
public:
    // Room for so many numbers; what they are is not said.
    Number* make_room(Index count) {
        const size_t num_lines = (count * sizeof(Number) + sizeof(Line) - 1) / sizeof(Line);
        lines_.resize(std::max(lines_.size(), num_lines));
        return data();
    }

    Number* data() { return reinterpret_cast<Number*>(lines_.data()); }

    const Number* data() const { return reinterpret_cast<const Number*>(lines_.data()); }

private:
    struct alignas(LINE_BYTES) Line {
        char bytes[LINE_BYTES];
    };

    std::vector<Line> lines_;
};
