// Where the keys and values of a row lie, tile by tile, and which of them a token sees.
#pragma once
#include "ops.h"
#include "vec.h"

namespace {

constexpr int TILE = 32;  // keys; part of what a bit is, never tuned per call
constexpr int PAD = 16;   // scratch of heads and of queries is padded to a multiple of this
constexpr int QUERIES_MAX = W == 16 ? 12 : 6;  // of a register block
constexpr int LINE = 64;  // bytes that come from memory together
static_assert(TILE % W == 0 && PAD % W == 0, "a tile and a padded head are whole vectors");

// What a tile's positions are to an item: keys low..n are seen by any token, every one of them by all if `full`.
struct Reach {
    int64_t seen_first;  // keys that the item's first token sees
    int num_tokens, window;

    int low(int64_t first, int t) const {
        const int64_t unseen = window ? seen_first + t - window - first : 0;
        return unseen <= 0 ? 0 : unseen < TILE ? (int)unseen : TILE;
    }
    int n(int64_t first, int t) const {
        const int64_t seen = seen_first + t - first;
        return seen <= 0 ? 0 : seen < TILE ? (int)seen : TILE;
    }
};

// A row's new tokens item[1]..item[2], and the first tile of keys that one of them sees.
struct Start {
    int row, num_tokens;
    int64_t token;  // in the batch
    Reach reach;
    int64_t first;  // position of the tile; below first + low lies nothing that a token of this item sees
    int low, n;

    Start(const AttentionArgs* a, const int32_t* item)
        : row(item[0]), num_tokens(item[2] - item[1]), token(a->cu_seqlens[row] + item[1]),
          reach{a->kv_lens[row] - (a->cu_seqlens[row + 1] - a->cu_seqlens[row]) + item[1] + 1, num_tokens, a->window} {
        const int64_t unseen = a->window && reach.seen_first > a->window ? reach.seen_first - a->window : 0;
        first = unseen / TILE * TILE;
        low = (int)(unseen - first);
        n = reach.n(first, num_tokens - 1);
    }
};

// Where a tile's keys and values lie, of the first head: checked. A place that nobody sees stands for one that is seen,
// so that whatever is read was asked for and checked; what comes of it is dropped.
template <class T> struct TileRows {
    const T *key[TILE], *value[TILE];
};

// Positions first+low..first+n of a row, low < n; false where a block may not be read.
template <class T>
bool resolve(const AttentionArgs* a, int64_t token, int row, int64_t first, int low, int n, TileRows<T>* rows) {
    const int64_t step = (int64_t)a->num_kv_heads * a->head_size;
    int64_t index = (first + low) / a->block_size, offset = (first + low) % a->block_size;
    for (int j = low; j < n; index++, offset = 0) {
        const int64_t block = index < a->table_width ? a->block_tables[(int64_t)row * a->table_width + index] : -1;
        if (block < 0 || block >= a->num_blocks) {
            refuse(a, token, block, FLAG_OUT_OF_RANGE);
            return false;
        }
        if (a->block_tags && a->block_tags[block] != a->row_tags[row]) {
            refuse(a, token, block, FLAG_WRONG_OWNER);
            return false;
        }
        const int64_t slot = block * a->block_size + offset, left = a->block_size - offset;
        const int end = left < n - j ? j + (int)left : n;
        const T* key = (const T*)a->key_cache + slot * step;
        const T* value = (const T*)a->value_cache + slot * step;
        for (; j < end; j++, key += step, value += step) {
            rows->key[j] = key;
            rows->value[j] = value;
        }
    }
    for (int j = 0; j < TILE; j++)
        if (j < low || j >= n) {
            rows->key[j] = rows->key[low];
            rows->value[j] = rows->value[low];
        }
    return true;
}

// Asks memory for `num_bytes` into the second cache: the first has no room for a tile of all heads beside the one at work,
// and asking it cost half the speed.
inline void fetch(const void* from, int64_t num_bytes) {
    for (int64_t i = 0; i < num_bytes; i += LINE)
        __builtin_prefetch((const char*)from + i, 0, 2);
}

} // namespace
