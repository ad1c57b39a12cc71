// The output of a tile: each channel is one chain of multiply-adds over the values that a token sees, in their order.
#pragma once
#include "tiles.h"

namespace {

// Vectors side by side for R queries: see KEY_VECTORS.
template <int R> constexpr int VALUE_VECTORS = R <= (W == 16 ? 6 : 3) ? 4 : 2;

// Outputs in the making lie in another order than in memory where values are bfloat16: of each whole 2 * W channels the even
// ones come first, then the odd ones, because a shift and a mask part a word of two channels, and bringing them into their
// order takes as long again. `store_output` undoes it.
template <class T> inline int64_t num_parted(int64_t size) {
    return sizeof(T) == 2 ? size / (2 * W) * (2 * W) : 0;
}

template <class T> inline void load_parted(const T* from, vf* even, vf* odd) {
    vu words;
    __builtin_memcpy(&words, from, sizeof words);
    *even = (vf)(words << 16);
    *odd = (vf)(words & 0xffff0000u);
}

template <int... I> inline vf merged(vf even, vf odd, Lanes<I...>, bool upper) {
    return upper ? __builtin_shufflevector(even, odd, (W / 2 + I / 2 + (I % 2 ? W : 0))...)
                 : __builtin_shufflevector(even, odd, (I / 2 + (I % 2 ? W : 0))...);
}

template <class T> inline void store_output(const float* from, float divisor, T* to, int size) {
    int i = 0;
    for (; i < num_parted<T>(size); i += 2 * W) {
        const vf even = load(from + i) / divisor, odd = load(from + i + W) / divisor;
        store(to + i, merged(even, odd, Count<W>::type(), false));
        store(to + i + W, merged(even, odd, Count<W>::type(), true));
    }
    for (; i < size; i += W) {
        const int n = upto(size - i);
        store_upto(to + i, load_upto(from + i, n) / divisor, n);
    }
}

template <class T> void widen(const T* from, float* to, int size, bool parted) {
    int i = 0;
    for (; parted && i < num_parted<T>(size); i += 2 * W) {
        vf even, odd;
        load_parted(from + i, &even, &odd);
        store(to + i, even);
        store(to + i + W, odd);
    }
    for (; i < size; i += W) {
        const int n = upto(size - i);
        store_upto(to + i, load_upto(from + i, n), n);
    }
}

// Values that are used once are read from the cache itself, and what is read is asked for in the next tile; values that
// were widened before have been asked for then.
template <class S> constexpr bool ONCE = sizeof(S) == 2;

// Channels c..c+V*W of R outputs [R, stride] take the values of keys low..n, weighed.
template <int R, int V, class S>
void mix_block(const float* weights, const float* correction, const S* const* values, const S* const* ahead, int64_t at, int low,
               int n, int c, int last, float* out, int64_t stride) {
    const bool first_of_line = V * W * sizeof(S) >= LINE || c * (int)sizeof(S) % LINE == 0;
    vf sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            sums[r][v] = load(out + r * stride + c + v * W) * correction[r];
    for (int j = low; j < n; j++) {
        vf value[V];
        if (ONCE<S> && first_of_line)
#pragma GCC unroll 4
            for (int i = 0; i < V * W; i += LINE / (int)sizeof(S))
                __builtin_prefetch(ahead[j] + at + c + i, 0, 2);
        if constexpr (V > 1 && sizeof(S) == 2) {
#pragma GCC unroll 16
            for (int v = 0; v < V; v += 2)
                load_parted(values[j] + at + c + v * W, value + v, value + v + 1);
        } else {
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                value[v] = V == 1 ? load_upto(values[j] + at + c, last) : load(values[j] + at + c + v * W);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            const vf weight = splat(weights[r * TILE + j]);
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                sums[r][v] = fma(value[v], weight, sums[r][v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            store(out + r * stride + c + v * W, sums[r][v]);
}

template <class S, int R = QUERIES_MAX>
void mix(int num, const float* weights, const float* correction, const S* const* values, const S* const* ahead, int64_t at,
         int low, int n, int size, float* out, int64_t stride) {
    if constexpr (R > 1) {
        if (num < R) {
            mix<S, R - 1>(num, weights, correction, values, ahead, at, low, n, size, out, stride);
            return;
        }
    }
    constexpr int V = VALUE_VECTORS<R>;
    int c = 0;
    for (; c + V * W <= size; c += V * W)
        mix_block<R, V>(weights, correction, values, ahead, at, low, n, c, W, out, stride);
    if (V > 2 && c + 2 * W <= size) {
        mix_block<R, 2>(weights, correction, values, ahead, at, low, n, c, W, out, stride);
        c += 2 * W;
    }
    for (; c < size; c += W)
        mix_block<R, 1>(weights, correction, values, ahead, at, low, n, c, upto(size - c), out, stride);
}

} // namespace
