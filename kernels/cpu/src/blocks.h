// Ops on whole blocks as bytes: the same on every instruction set, since nothing in them is a floating point number.
#pragma once
#include "ops.h"

namespace {

constexpr int DIGEST_LANES = 4;
constexpr uint64_t DIGEST_A = 0x9e3779b185ebca87u, DIGEST_B = 0xc2b2ae3d27d4eb4fu;

inline uint64_t rotated(uint64_t x, int by) {
    return x << by | x >> ((64 - by) & 63);  // by 0 is allowed
}

inline bool is_block(const BlocksArgs* a, int64_t index) {
    return a->block_ids[index] >= 0 && a->block_ids[index] < a->num_blocks;
}

// Blocks begin..end of the list: see kernels/reference.py. Of a block out of range: nothing, and its digest is left.
inline void digest_blocks(const BlocksArgs* a, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++) {
        if (!is_block(a, index))
            continue;
        uint64_t lanes[DIGEST_LANES];
        for (int i = 0; i < DIGEST_LANES; i++)
            lanes[i] = a->key[i % 2] + (uint64_t)i * DIGEST_A;
        for (int part = 0; part < 2; part++) {
            const char* from = (const char*)(part ? a->values : a->keys) + a->block_ids[index] * a->block_bytes;
            for (int64_t at = 0; at < a->block_bytes; at += 8 * DIGEST_LANES)
                for (int i = 0; i < DIGEST_LANES && at + 8 * i < a->block_bytes; i++) {
                    const int64_t left = a->block_bytes - at - 8 * i;
                    uint64_t word = 0;
                    __builtin_memcpy(&word, from + at + 8 * i, left < 8 ? (size_t)left : 8);
                    lanes[i] = rotated(lanes[i] + word * DIGEST_B, 31) * DIGEST_A;
                }
        }
        for (int half = 0; half < 2; half++) {
            uint64_t sum = a->key[half] ^ (uint64_t)a->block_bytes;
            for (int i = 0; i < DIGEST_LANES; i++)
                sum = (sum ^ rotated(lanes[i], half ? 29 : 0)) * DIGEST_B + (uint64_t)i;
            sum ^= sum >> 33;
            sum *= DIGEST_A;
            a->digests[2 * index + half] = sum ^ sum >> 29;
        }
    }
}

inline void fill_blocks(const BlocksArgs* a, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; index++)
        if (is_block(a, index)) {
            const int64_t at = a->block_ids[index] * a->block_bytes;
            __builtin_memset((char*)a->keys + at, a->fill, (size_t)a->block_bytes);
            __builtin_memset((char*)a->values + at, a->fill, (size_t)a->block_bytes);
        }
}

} // namespace
