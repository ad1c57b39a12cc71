// What is multiplied by up: silu or gelu of gate, lane by lane.
#pragma once
#include "ops.h"
#include "vec.h"

namespace {

inline vf activated(vf x, int32_t kind) {
    if (kind == ACTIVATION_SILU)
        return x / (1.0f + exp(-x));
    if (kind == ACTIVATION_GELU_TANH)
        return 0.5f * x * (1.0f + tanh(0.7978845608028654f * fma(0.044715f * x * x, x, x)));
    const vf beyond = 0.5f * erfc_positive((x < vf{} ? -x : x) * 0.7071067811865476f);
    return x * (x < vf{} ? beyond : 1.0f - beyond);
}

} // namespace
