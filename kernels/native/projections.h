// Modules that share an input: the base's product and what adapters add to it, in one pass over the outputs.
#pragma once

#include "low_rank.h"
#include "panels.h"

using Product = void (*)(const Tokens*, const LinearPart*, Index, const AfterPair*);

constexpr Index MOST_PARTS = 3;

struct Projections {
    Product product;
    const LinearPart* parts;
    Index num_parts;
    const Addition* additions;
    Index num_additions;
};

// Writes the outputs that `parts`, copies of the group's own, say, or hands them on in pairs.
template <typename Number>
static void project(const Projections& group, const Tokens& tokens, const Segment* segments, Index num_segments,
                    LinearPart* parts, const AfterPair* after = nullptr) {
    AddedRows added[MOST_PARTS];
    WeighedRows rows{};
    if (num_segments > 0 && group.num_additions > 0)
        rows = weigh_rows<Number>(tokens, {group.additions, group.num_additions, segments, num_segments});
    for (Index i = 0; i < rows.num_parts; ++i) {
        const Index place = rows.parts[i].part->place;
        added[place] = {&rows, &rows.parts[i]};
        parts[place].rows = &added[place];
    }
    group.product(&tokens, parts, group.num_parts, after);
}
