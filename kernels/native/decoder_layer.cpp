// Decoder layers in one call: what their kernels compute one by one, without anything in between.
//
//     h = x + norm(O attention(rotate(Q n), rotate(K n), V n))      n = norm(x)
//     y = h + norm(down(activation(gate m) * up m))                 m = norm(h), or norm(x) of a parallel layer
//
// Of the norms a layer has those of its family: the Llama family has those of n and m, OLMo 2 the others, Gemma 2 all four.
// Without a gate it is down(activation(up m)); of a layer without an MLP, whose caller has a mixture of experts, there is h alone.

#include "attention.h"
#include "gating.h"
#include "lines.h"
#include "norms.h"
#include "projections.h"
#include "rotation.h"

struct DecoderLayer {
    Projections queries_keys_values;  // three modules, or one of all outputs
    Projections output;
    Projections gate_and_up;  // two, or one of both, or up alone
    Projections down;  // without parts: there is no MLP
    Norm before_attention, after_attention, before_mlp, after_mlp, query_norm, key_norm;
    void* keys;  // of the cache, [num_slots, num_kv_heads, dim] or tiles
    void* values;
    const float* sinks;  // [num_heads], or null
    Index num_heads, num_kv_heads, dim, is_tiled, window;
    Index head_groups;  // of one module of all heads, whose outputs are each group's queries, keys and values
    Index angles;  // which of the step's
    Activation activation;
    Index is_gated, is_parallel;
    float scale, softcap;    // of attention; no softcap: 0
    float residual_scale;  // of what is added to x
};

struct Angles {
    const float* cos;  // [num_tokens, dim]
    const float* sin;
    Index dim;  // 0: nothing is turned
    Index by_neighbours;
};

// What all layers of a step share. `attentions` tell which tokens attend to which slots; the rest of them is set here.
struct Step {
    Index num_tokens;
    const Angles* angles;
    const Index* slots;  // [num_tokens]
    const Attention* attentions;
    Index num_attentions;
    const Segment* segments;
    Index num_segments;
};

// x [num_tokens, d_in] -> `outputs`, onto what is there if `add`; or with `after` no outputs.
template <typename Number>
static void project(const Projections& modules, const Step& step, const Number* x, Index d_in, Number* const* outputs,
                    bool add, const AfterPair* after = nullptr) {
    LinearPart parts[MOST_PARTS];
    for (Index p = 0; p < modules.num_parts; ++p) {
        parts[p] = modules.parts[p];
        parts[p].add = add;
        parts[p].y = after ? nullptr : outputs[p];
    }
    project<Number>(modules, {x, step.num_tokens, d_in, d_in}, step.segments, step.num_segments, parts, after);
}

// Columns [first, first + width) of rows of `stride`, as rows of their own.
template <typename Number>
static void copy_columns(const Number* rows, Index stride, Index first, Index width, Number* y, Index num_rows) {
    parallel_ranges(num_rows, num_rows * width, [&](Index begin, Index end) {
        for (Index row = begin; row < end; ++row) std::copy_n(rows + row * stride + first, width, y + row * width);
    });
}

// y += x * scale, elementwise; both are rounded.
template <typename Number>
static void add_scaled(const Number* x, float scale, Number* y, Index count) {
    parallel_ranges(count, count, [&](Index begin, Index end) {
        const Index whole = begin + (end - begin) / LANES * LANES;
        for (Index i = begin; i < whole; i += LANES)
            store_lanes(round_lanes<Number>(load_lanes(x + i) * scale) + load_lanes(y + i), y + i);
        for (Index i = whole; i < end; ++i)
            y[i] = from_float<Number>(to_float(from_float<Number>(to_float(x[i]) * scale)) + to_float(y[i]));
    });
}

// A layer on the tokens of a step. Its members are memory for what lies between the products.
template <typename Number>
class Pass {
public:
    Pass(const DecoderLayer& layer, const Step& step, Number* x) : layer(layer), step(step), x(x) {
        static thread_local Lines<Number> workspace;
        const Index heads = is_fused(layer.queries_keys_values) ? query_width + 2 * kv_width : 0;
        const Index pair = is_pair_fused() ? 2 * inner : 0, ahead = layer.is_parallel ? hidden : 0;
        normalized = workspace.make_room(n * (hidden + 2 * query_width + 2 * kv_width + inner + std::max(heads, pair) + ahead));
        query = normalized + n * hidden;
        key = query + n * query_width;
        value = key + n * kv_width;
        attended = value + n * kv_width;
        gated = attended + n * query_width;
        fused = gated + n * inner;
        for_mlp = fused + n * std::max(heads, pair);
    }

    void run() const {
        if (layer.is_parallel) normalize(x, layer.before_mlp, for_mlp, n * hidden, false);
        project_heads(normalized_by(layer.before_attention));
        if (layer.query_norm.weight) normalize(query, layer.query_norm, query, n * query_width, false);
        if (layer.key_norm.weight) normalize(key, layer.key_norm, key, n * kv_width, false);
        const Angles& angles = step.angles[layer.angles];
        rotate_and_store<Number>({query, key, value, angles.cos, angles.sin, layer.keys, layer.values, step.slots, n,
                                  layer.num_heads, layer.num_kv_heads, layer.dim, angles.dim, layer.is_tiled,
                                  angles.by_neighbours});
        attend_all();
        add_projected(layer.output, attended, query_width, layer.after_attention);

        if (!has_mlp()) return;
        // Of a parallel layer, too, behind its attention, as transformers has it: what a fusion's weights come from is there.
        project_gated(layer.is_parallel ? for_mlp : normalized_by(layer.before_mlp));
        add_projected(layer.down, gated, inner, layer.after_mlp);
    }

private:
    static bool is_fused(const Projections& modules) { return modules.num_parts == 1; }

    bool has_mlp() const { return layer.down.num_parts > 0; }

    bool is_pair_fused() const { return layer.is_gated && is_fused(layer.gate_and_up); }

    const Number* normalized_by(const Norm& norm) const {
        if (!norm.weight) return x;
        normalize(x, norm, normalized, n * hidden, false);
        return normalized;
    }

    void project_heads(const Number* input) const {
        Number* const three[] = {query, key, value};
        if (!is_fused(layer.queries_keys_values))
            return project(layer.queries_keys_values, step, input, hidden, three, false);
        project(layer.queries_keys_values, step, input, hidden, &fused, false);
        const Index queries = query_width / layer.head_groups, keys = kv_width / layer.head_groups;
        const Index stride = queries + 2 * keys, num_rows = n * layer.head_groups;
        copy_columns(fused, stride, 0, queries, query, num_rows);
        copy_columns(fused, stride, queries, keys, key, num_rows);
        copy_columns(fused, stride, queries + keys, keys, value, num_rows);
    }

    // Queries and the cache, which has the tokens' keys and values by now -> attended.
    void attend_all() const {
        for (Index i = 0; i < step.num_attentions; ++i) {
            Attention attention = step.attentions[i];
            attention.query = query;
            attention.keys = layer.keys;
            attention.values = layer.values;
            attention.sinks = layer.sinks;
            attention.output = attended;
            attention.num_heads = layer.num_heads;
            attention.num_kv_heads = layer.num_kv_heads;
            attention.dim = attention.value_dim = layer.dim;
            attention.is_tiled = layer.is_tiled;
            attention.window = layer.window;
            attention.scale = layer.scale;
            attention.softcap = layer.softcap;
            attend<Number>(attention);
        }
    }

    // What `down` takes.
    void project_gated(const Number* input) const {
        if (!layer.is_gated) return project_activated(input);
        if (!is_fused(layer.gate_and_up)) {
            const Gating gating{gated, inner, layer.activation};
            const AfterPair after{Gating::run<Number>, &gating, sizeof(Number)};
            return project<Number>(layer.gate_and_up, step, input, hidden, nullptr, false, &after);
        }
        project(layer.gate_and_up, step, input, hidden, &fused, false);
        parallel_ranges(n, n * inner, [&](Index begin, Index end) {
            for (Index token = begin; token < end; ++token) {
                const Number* gate = fused + token * 2 * inner;
                gate_numbers(layer.activation, gate, gate + inner, gated + token * inner, inner);
            }
        });
    }

    void project_activated(const Number* input) const {
        project(layer.gate_and_up, step, input, hidden, &gated, false);
        parallel_ranges(n, n * inner, [&](Index begin, Index end) {
            activate_numbers(layer.activation, gated + begin * inner, gated + begin * inner, (end - begin) * inner);
        });
    }

    // x += what a module makes of y [num_tokens, d_in], normalized or scaled before if the layer says so.
    void add_projected(const Projections& module, const Number* y, Index d_in, const Norm& norm) const {
        if (!norm.weight && layer.residual_scale == 1) return project(module, step, y, d_in, &x, true);
        project(module, step, y, d_in, &normalized, false);
        if (norm.weight) return normalize(normalized, norm, x, n * hidden, true);
        add_scaled(normalized, layer.residual_scale, x, n * hidden);
    }

    const DecoderLayer& layer;
    const Step& step;
    Number* const x;
    const Index n = step.num_tokens, hidden = layer.output.parts[0].d_out;
    const Index inner = has_mlp() ? layer.gate_and_up.parts[0].d_out / (is_pair_fused() ? 2 : 1) : 0;
    const Index query_width = layer.num_heads * layer.dim, kv_width = layer.num_kv_heads * layer.dim;
    Number *normalized, *query, *key, *value, *attended, *gated, *fused, *for_mlp;
};

template <typename Number>
static void decoder_layers(const DecoderLayer* const* layers, Index num_layers, const Step& step, Number* x) {
    for (Index i = 0; i < num_layers; ++i) Pass<Number>(*layers[i], step, x).run();
}

extern "C" {
void decoder_layers_f32(const DecoderLayer* const* layers, Index num_layers, const Step* step, float* x) {
    decoder_layers(layers, num_layers, *step, x);
}
void decoder_layers_bf16(const DecoderLayer* const* layers, Index num_layers, const Step* step, BFloat16* x) {
    decoder_layers(layers, num_layers, *step, x);
}
void decoder_layers_f16(const DecoderLayer* const* layers, Index num_layers, const Step* step, Float16* x) {
    decoder_layers(layers, num_layers, *step, x);
}
}
