// Decoder layers of the Llama family in one call: what their kernels compute one by one, without anything in between.
//
//     h = x + O attention(rotate(Q n), rotate(K n), V n)      n = rms_norm(x)
//     y = h + down(silu(gate m) * up m)                       m = rms_norm(h)

#include "attention.h"
#include "lines.h"
#include "pointwise.h"
#include "projections.h"

struct Norm {
    const void* weight;  // null: there is no such norm
    float epsilon;
};

struct DecoderLayer {
    Projections queries_keys_values, output, gate_and_up, down;
    Norm input_norm, inner_norm, query_norm, key_norm;
    void* keys;  // of the cache, [num_slots, num_kv_heads, dim] or tiles
    void* values;
    Index dim, is_tiled, window;
    float scale;
};

// What all layers of a step share. `attentions` tell which tokens attend to which slots; the rest of them is set here.
struct Step {
    Index num_tokens;
    const void* cos;  // [num_tokens, dim]
    const void* sin;
    const Index* slots;  // [num_tokens]
    const Attention* attentions;
    Index num_attentions;
    const Segment* segments;
    Index num_segments;
};

// silu(gate) up of a block, where the layer keeps it.
struct Gating {
    void* gated;  // [num_tokens, width]
    Index width;

    template <typename Number>
    static void run(const void* gating, const LinearPart* parts, const Block& block) {
        const Gating& self = *static_cast<const Gating*>(gating);
        const Outputs gate{parts[0].y, parts[0].y_stride}, up{parts[1].y, parts[1].y_stride}, y{self.gated, self.width};
        for (Index token = 0; token < block.num_tokens; ++token)
            gate_numbers(gate.at<Number>(token, block.column), up.at<Number>(token, block.column),
                         y.at<Number>(block.token + token, block.column), block.num_columns);
    }
};

// x [num_tokens, d_in] -> `outputs`, onto what is there if `add`; or with `gated` silu(gate) up and no other output.
template <typename Number>
static void project(const Projections& modules, const Step& step, const Number* x, Index d_in, Number* const* outputs,
                    bool add, Number* gated = nullptr) {
    LinearPart parts[MOST_PARTS];
    for (Index p = 0; p < modules.num_parts; ++p) {
        parts[p] = modules.parts[p];
        parts[p].add = add;
        parts[p].y = gated ? nullptr : outputs[p];
    }
    const Gating gating{gated, parts[0].d_out};
    const AfterPair after{Gating::run<Number>, &gating, sizeof(Number)};
    project<Number>(modules, {x, step.num_tokens, d_in, d_in}, step.segments, step.num_segments, parts,
                    gated ? &after : nullptr);
}

template <typename Number>
static void normalize(const Norm& norm, const Number* x, Number* y, Index num_rows, Index width) {
    rms_norm(x, static_cast<const Number*>(norm.weight), y, num_rows, width, norm.epsilon);
}

// Queries of the tokens at `query` and the cache, which has their keys and values by now -> attended.
template <typename Number>
static void attend_all(const DecoderLayer& layer, const Step& step, const Number* query, Index num_heads,
                       Index num_kv_heads, Number* attended) {
    for (Index i = 0; i < step.num_attentions; ++i) {
        Attention attention = step.attentions[i];
        attention.query = query;
        attention.keys = layer.keys;
        attention.values = layer.values;
        attention.output = attended;
        attention.num_heads = num_heads;
        attention.num_kv_heads = num_kv_heads;
        attention.dim = attention.value_dim = layer.dim;
        attention.is_tiled = layer.is_tiled;
        attention.window = layer.window;
        attention.scale = layer.scale;
        attention.softcap = 0;
        attend<Number>(attention);
    }
}

template <typename Number>
static void decoder_layer(const DecoderLayer& layer, const Step& step, Number* x) {
    const LinearPart* heads = layer.queries_keys_values.parts;
    const Index n = step.num_tokens, hidden = layer.output.parts[0].d_out, inner = layer.gate_and_up.parts[0].d_out;
    const Index query_width = heads[0].d_out, kv_width = heads[1].d_out;
    const Index num_heads = query_width / layer.dim, num_kv_heads = kv_width / layer.dim;

    static thread_local Lines<Number> workspace;
    Number* normalized = workspace.make_room(n * (hidden + 2 * query_width + 2 * kv_width + inner));
    Number *query = normalized + n * hidden, *key = query + n * query_width, *value = key + n * kv_width;
    Number *attended = value + n * kv_width, *gated = attended + n * query_width;

    normalize(layer.input_norm, x, normalized, n, hidden);
    Number* const three[] = {query, key, value};
    project(layer.queries_keys_values, step, normalized, hidden, three, false);
    if (layer.query_norm.weight) normalize(layer.query_norm, query, query, n * num_heads, layer.dim);
    if (layer.key_norm.weight) normalize(layer.key_norm, key, key, n * num_kv_heads, layer.dim);
    rotate_and_store<Number>({query, key, value, step.cos, step.sin, layer.keys, layer.values, step.slots, n, num_heads,
                              num_kv_heads, layer.dim, layer.is_tiled});
    attend_all(layer, step, query, num_heads, num_kv_heads, attended);
    project(layer.output, step, attended, query_width, &x, true);

    normalize(layer.inner_norm, x, normalized, n, hidden);
    project<Number>(layer.gate_and_up, step, normalized, hidden, nullptr, false, gated);
    project(layer.down, step, gated, inner, &x, true);
}

extern "C" {
void decoder_layers_f32(const DecoderLayer* const* layers, Index num_layers, const Step* step, float* x) {
    for (Index i = 0; i < num_layers; ++i) decoder_layer(*layers[i], *step, x);
}
void decoder_layers_bf16(const DecoderLayer* const* layers, Index num_layers, const Step* step, BFloat16* x) {
    for (Index i = 0; i < num_layers; ++i) decoder_layer(*layers[i], *step, x);
}
}
