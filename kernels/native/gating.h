// activation(gate) up of a block of both parts, where the caller keeps it: what follows a pair of modules (`AfterPair`).
#pragma once

#include "activations.h"
#include "panels.h"

struct Gating {
    void* gated;  // [num_tokens, width]
    Index width;
    Activation activation;

    template <typename Number>
    static void run(const void* gating, const LinearPart* parts, const Block& block) {
        const Gating& self = *static_cast<const Gating*>(gating);
        const Outputs gate{parts[0].y, parts[0].y_stride}, up{parts[1].y, parts[1].y_stride}, y{self.gated, self.width};
        for (Index token = 0; token < block.num_tokens; ++token)
            gate_numbers(self.activation, gate.at<Number>(token, block.column), up.at<Number>(token, block.column),
                         y.at<Number>(block.token + token, block.column), block.num_columns);
    }
};
