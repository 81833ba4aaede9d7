// Groups of modules one by one, for steps whose layers are not computed in one call.

#include "projections.h"

#include <algorithm>

template <typename Number>
static void project_segments(const Projections& group, const Tokens& tokens, const Segment* segments, Index num_segments) {
    LinearPart parts[MOST_PARTS];
    std::copy(group.parts, group.parts + group.num_parts, parts);
    project<Number>(group, tokens, segments, num_segments, parts);
}

extern "C" {
void project_f32(const Projections* group, const Tokens* tokens, const Segment* segments, Index num_segments) {
    project_segments<float>(*group, *tokens, segments, num_segments);
}
void project_bf16(const Projections* group, const Tokens* tokens, const Segment* segments, Index num_segments) {
    project_segments<BFloat16>(*group, *tokens, segments, num_segments);
}
void project_f16(const Projections* group, const Tokens* tokens, const Segment* segments, Index num_segments) {
    project_segments<Float16>(*group, *tokens, segments, num_segments);
}
}
