// Spreads the pieces of a kernel's work over the cores.
#pragma once

#include "number.h"

// Below this many elements a second thread costs more than it saves.
constexpr Index SERIAL_ELEMENTS = 16384;

int num_threads();

using Piece = void (*)(const void* work, Index piece);

// Calls run(work, piece) for every piece in [0, count), on the calling thread and on those that are free to help.
void run_pieces(Piece run, const void* work, Index count);

// Calls work(piece) for every piece in [0, count), in no order.
template <typename Work>
static inline void parallel(Index count, const Work& work) {
    run_pieces([](const void* w, Index piece) { (*static_cast<const Work*>(w))(piece); }, &work, count);
}

// Calls work(begin, end) for ranges that cover [0, count); one range if that many elements are too few to share.
template <typename Work>
static inline void parallel_ranges(Index count, Index num_elements, const Work& work) {
    const Index num_ranges = num_elements > SERIAL_ELEMENTS ? (count < 4 * num_threads() ? count : 4 * num_threads()) : 1;
    if (num_ranges <= 1) return work(Index(0), count);
    parallel(num_ranges, [&](Index range) { work(count * range / num_ranges, count * (range + 1) / num_ranges); });
}
