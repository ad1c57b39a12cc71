// What a row of logits is scanned for: the maxima of groups of columns, and the columns above a threshold. src/top.h puts
// the two together. Nothing is summed: every instruction set finds the same.
#pragma once
#include "ops.h"
#include "vec.h"

namespace {

// A group is one lane of `group_vectors` vectors that follow each other; columns beyond the last whole vector are a vector
// of their own, filled up with what is below all. Groups come vector by vector, lane by lane.
bool group_maxima(const float* row, int64_t num_columns, int64_t group_vectors, float* maxima) {
    vi broken = {};
    const int64_t width = group_vectors * W;
    for (int64_t begin = 0; begin < num_columns; begin += width, maxima += W) {
        const int64_t end = begin + width < num_columns ? begin + width : num_columns;
        vf best = splat(-__builtin_inff());
        int64_t i = begin;
        for (; i + W <= end; i += W) {
            const vf x = load(row + i);
            broken |= x - x != vf{};  // of a NaN or an infinity that is no zero
            best = x > best ? x : best;
        }
        if (i < end) {
            const int n = (int)(end - i);
            const vf x = load_part(row + i, n);
            broken |= x - x != vf{};
            best = lane_numbers() < n && x > best ? x : best;
        }
        store(maxima, best);
    }
    vf any = (vf)(broken & (vi)splat(1.0f));
    return max_lanes(any) == 0.0f;
}

// A larger number is a larger key, and among equals a smaller column: the number's bits in the order of numbers above, the
// column's complement below. Both zeros are one number.
inline uint64_t key_of(float x, int64_t column) {
    uint32_t bits;
    x += 0.0f;
    __builtin_memcpy(&bits, &x, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)column;
}

int64_t at_least(const float* row, int64_t num_columns, float threshold, uint64_t* keys) {
    const vf least = splat(threshold);
    int64_t num = 0, i = 0;
    for (; i + 4 * W <= num_columns; i += 4 * W) {
        vi any = {};
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++)
            any |= load(row + i + v * W) >= least;
        if (max_lanes((vf)(any & (vi)splat(1.0f))) == 0.0f)
            continue;
        for (int64_t j = i; j < i + 4 * W; j++)
            if (row[j] >= threshold)
                keys[num++] = key_of(row[j], j);
    }
    for (; i < num_columns; i++)
        if (row[i] >= threshold)
            keys[num++] = key_of(row[i], i);
    return num;
}

} // namespace
