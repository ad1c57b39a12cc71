// Where a product of gate and up ends: silu(gate) * up while the sums are still in the nearest cache. The bits are those
// of the product and the activation one after the other: both halves are rounded to the weight's dtype in between.
#pragma once
#include "activated.h"
#include "ops.h"
#include "vec.h"

namespace {

template <class T> inline vf rounded(vf v) {
    T lanes[W];
    store(lanes, v);
    return load(lanes);
}

template <> inline vf rounded<float>(vf v) {
    return v;
}

// `num` rows of sums, `stride` floats from one to the next, of `num_columns` columns (a multiple of W) from first_column
// on, to y. Not inlined: the tiles of every number of rows share it.
template <class T>
__attribute__((noinline)) void gate(const ProductArgs* a, const float* gates, const float* ups, int64_t stride, int64_t row,
                                    int num, int64_t first_column, int num_columns) {
    for (int i = 0; i < num_columns; i += W) {
        const int64_t column = first_column + i, left = a->num_outputs - column;
        if (left <= 0)
            break;
        const int n = upto(left);
        vf gate_bias = {}, up_bias = {};
        if (a->bias) {
            gate_bias = load_upto((const T*)a->bias + column, n);
            up_bias = load_upto((const T*)a->bias + a->num_outputs + column, n);
        }
        for (int m = 0; m < num; m++) {
            vf gate = load(gates + m * stride + i), up = load(ups + m * stride + i);
            if (a->bias) {  // adding a zero would make 0 of -0
                gate += gate_bias;
                up += up_bias;
            }
            const vf y = activated(rounded<T>(gate), ACTIVATION_SILU) * rounded<T>(up);
            store_upto((T*)a->y + (row + m) * a->num_outputs + column, y, n);
        }
    }
}

} // namespace
