// The `count` largest logits of a row, in order, without sorting the row. The maxima of groups of columns tell a threshold
// that at least `count` columns reach (each of the `count` largest maxima is one of them); what reaches it is little more
// than `count`, and is sorted by keys that are all different: number, then column. Included by library.cpp only: the
// standard library's sorting must not be compiled for an instruction set that the machine may lack.
#pragma once
#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "ops.h"

namespace {

constexpr int64_t GROUPS_EACH = 6;  // for each of the wanted, so that few groups hold two of them
constexpr int64_t DIGITS_FROM = 1000;  // wanted

inline int64_t group_vectors(const Ops* ops, const TopArgs* a) {
    const int64_t num_vectors = (a->num_columns + ops->lanes - 1) / ops->lanes;
    const int64_t wanted = (a->count * GROUPS_EACH + ops->lanes - 1) / ops->lanes;
    return num_vectors > wanted ? num_vectors / wanted : 1;
}

inline int64_t num_groups(const Ops* ops, const TopArgs* a) {
    const int64_t width = group_vectors(ops, a) * ops->lanes;
    return (a->num_columns + width - 1) / width * ops->lanes;
}

// Bytes: maxima, keys, and as many again to sort into.
inline int64_t maxima_bytes(const Ops* ops, const TopArgs* a) {
    return (num_groups(ops, a) * (int64_t)sizeof(float) + 63) / 64 * 64;
}
inline int64_t top_bytes(const Ops* ops, const TopArgs* a) {
    return maxima_bytes(ops, a) + 2 * a->num_columns * (int64_t)sizeof(uint64_t);
}

// Keys in the order of their columns -> the largest first: a digit of the number at a time, from the lowest, each pass
// keeping the order of equals. For thousands of keys it takes a tenth of what comparing does.
inline void sort_by_digits(uint64_t* keys, uint64_t* other, int64_t num) {
    constexpr int BITS = 11, SIZE = 1 << BITS;
    for (int shift = 32; shift < 64; shift += BITS) {
        int64_t places[SIZE] = {};
        for (int64_t i = 0; i < num; i++)
            places[~keys[i] >> shift & (SIZE - 1)]++;
        for (int64_t digit = 0, begin = 0; digit < SIZE; digit++) {
            const int64_t here = places[digit];
            places[digit] = begin;
            begin += here;
        }
        for (int64_t i = 0; i < num; i++)
            other[places[~keys[i] >> shift & (SIZE - 1)]++] = keys[i];
        std::swap(keys, other);
    }
    std::copy(keys, keys + num, other);  // three passes: what is sorted lies in the other half
}

inline void top(const Ops* ops, const TopArgs* a, int64_t row, void* scratch) {
    const float* logits = a->logits + row * a->num_columns;
    float* maxima = static_cast<float*>(scratch);
    auto* keys = reinterpret_cast<uint64_t*>(static_cast<char*>(scratch) + maxima_bytes(ops, a));
    const int64_t num = num_groups(ops, a);
    a->finite[row] = ops->group_maxima(logits, a->num_columns, group_vectors(ops, a), maxima);
    if (!a->finite[row])
        return;
    // A vector that is not full leaves maxima of -infinity, so that there may be too few of numbers: then all columns go.
    float threshold = -__builtin_inff();
    if (a->count <= num) {
        std::nth_element(maxima, maxima + a->count - 1, maxima + num, std::greater<float>());
        threshold = maxima[a->count - 1];
    }
    const int64_t num_keys = ops->at_least(logits, a->num_columns, threshold, keys);
    if (a->count >= DIGITS_FROM) {
        sort_by_digits(keys, keys + a->num_columns, num_keys);
    } else {
        if (a->count < num_keys)
            std::nth_element(keys, keys + a->count - 1, keys + num_keys, std::greater<uint64_t>());
        std::sort(keys, keys + a->count, std::greater<uint64_t>());
    }
    for (int64_t i = 0; i < a->count; i++)
        a->ids[row * a->count + i] = static_cast<int64_t>(~static_cast<uint32_t>(keys[i]));
}

} // namespace
