// Paged attention, for decode rows and prefill chunks alike: keys and values are read once for all query heads that share
// them. Why a row's bits are its own, whoever shares the pass:
//
//     score   one chain of multiply-adds over the head's channels, from the first to the last
//     softmax in absolute tiles of TILE keys from the sequence's start: maximum and sum over a tile's lanes in a fixed tree
//     output  corrected once a tile, then one chain of multiply-adds over the keys that this token sees, in their order
//
// Where bfloat16 has an instruction of its own, a link of a score's chain is a pair of channels.
//
// Register blocks of several queries only put separate chains side by side. Keys that a token does not see are dropped from
// its scores by selection and are no links of its chains: a NaN there cannot reach it.
#pragma once
#include "ops.h"
#include "vec.h"

namespace {

constexpr int TILE = 32;  // keys; part of what a bit is, never tuned per call
constexpr int PAD = 16;   // scratch of heads and of queries is padded to a multiple of this
constexpr int QUERIES_MAX = W == 16 ? 12 : 6;  // of a register block
static_assert(TILE % W == 0 && PAD % W == 0, "a tile and a padded head are whole vectors");

// Vectors side by side for R queries: enough chains to keep the multiply-adders busy, few enough for the registers.
template <int R> constexpr int KEY_VECTORS = R <= 2 && TILE / W >= 4 ? 4 : 2;
template <int R> constexpr int VALUE_VECTORS = R <= (W == 16 ? 6 : 3) ? 4 : 2;

// What a link of a chain holds: `Word` as it lies in the scratch.
template <class T> struct Link {
    typedef float Word;
    typedef vf Vector;
    static constexpr int EACH = 1;  // channels

    static vf add(vf sum, vf one, vf other) { return fma(one, other, sum); }
};

inline vf vector_at(const float* p) {
    return load(p);
}

inline vf spread(float x) {
    return splat(x);
}

#if defined(__AVX512BF16__)

template <> struct Link<bf16> {
    typedef uint32_t Word;  // the lower of a pair in the lower half
    typedef vu Vector;
    static constexpr int EACH = 2;

    static vf add(vf sum, vu one, vu other) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)one, (__m512bh)other);
    }
};

inline vu vector_at(const uint32_t* p) {
    vu v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline vu spread(uint32_t x) {
    return x - vu{};
}

#endif

template <class T> constexpr bool IN_PAIRS = Link<T>::EACH == 2;

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

inline int64_t padded(int64_t size) {
    return (size + PAD - 1) / PAD * PAD;
}

// Of the pieces' scratch, as attend() lays it out.
inline int64_t num_queries_max(const AttentionArgs* a) {
    const int64_t of_a_head = (int64_t)a->item_tokens_max * (a->num_heads / a->num_kv_heads);
    return of_a_head > a->num_heads ? of_a_head : a->num_heads;
}

inline int64_t attention_scratch(const AttentionArgs* a) {
    const int64_t stride = padded(a->head_size), num = padded(num_queries_max(a));
    return stride * (2 * TILE + 1) + num * (2 * stride + TILE + 5);
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

// Scores [R, TILE] of keys begin..end, which are whole register blocks; query [R, stride], key [num, TILE] links.
template <int R, int V, class L, class Word>
void score_block(const Word* query, int64_t stride, const Word* key, int num, int begin, int end, float* scores) {
    for (int first = begin; first < end; first += V * W) {
        vf sums[R][V];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                sums[r][v] = vf{};
        for (int d = 0; d < num; d++) {
            typename L::Vector keys[V];
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                keys[v] = vector_at(key + d * TILE + first + v * W);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                const typename L::Vector one = spread(query[r * stride + d]);
#pragma GCC unroll 16
                for (int v = 0; v < V; v++)
                    sums[r][v] = L::add(sums[r][v], one, keys[v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                store(scores + r * TILE + first + v * W, sums[r][v]);
    }
}

template <class L, int R = QUERIES_MAX, class Word>
void score(int count, const Word* query, int64_t stride, const Word* key, int num, int low, int n, float* scores) {
    if constexpr (R > 1) {
        if (count < R) {
            score<L, R - 1>(count, query, stride, key, num, low, n, scores);
            return;
        }
    }
    constexpr int V = KEY_VECTORS<R>, KEYS = V * W;
    score_block<R, V, L>(query, stride, key, num, low / KEYS * KEYS, (n + KEYS - 1) / KEYS * KEYS, scores);
}

// Channels c..c+V*W of R outputs [R, stride] take the values of keys low..n, weighed.
template <int R, int V, class S>
void mix_block(const float* weights, const float* correction, const S* const* values, int low, int n, int c, int last,
               float* out, int64_t stride) {
    vf sums[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < V; v++)
            sums[r][v] = load(out + r * stride + c + v * W) * correction[r];
    for (int j = low; j < n; j++) {
        vf value[V];
        if constexpr (V > 1 && sizeof(S) == 2) {
#pragma GCC unroll 16
            for (int v = 0; v < V; v += 2)
                load_parted(values[j] + c + v * W, value + v, value + v + 1);
        } else {
#pragma GCC unroll 16
            for (int v = 0; v < V; v++)
                value[v] = V == 1 ? load_upto(values[j] + c, last) : load(values[j] + c + v * W);
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
void mix(int num, const float* weights, const float* correction, const S* const* values, int low, int n, int size,
         float* out, int64_t stride) {
    if constexpr (R > 1) {
        if (num < R) {
            mix<S, R - 1>(num, weights, correction, values, low, n, size, out, stride);
            return;
        }
    }
    constexpr int V = VALUE_VECTORS<R>;
    int c = 0;
    for (; c + V * W <= size; c += V * W)
        mix_block<R, V>(weights, correction, values, low, n, c, W, out, stride);
    if (V > 2 && c + 2 * W <= size) {
        mix_block<R, 2>(weights, correction, values, low, n, c, W, out, stride);
        c += 2 * W;
    }
    for (; c < size; c += W)
        mix_block<R, 1>(weights, correction, values, low, n, c, upto(size - c), out, stride);
}

// One query's scores of a tile become weights, in place, of the keys low..n that it sees; its maximum moves on.
inline void weigh(float* scores, int low, int n, float scale, float soft_cap, float* m, float* change, float* sum) {
    vf s[TILE / W], best = splat(-__builtin_inff());
#pragma GCC unroll 16
    for (int v = 0; v < TILE / W; v++) {
        s[v] = load(scores + v * W) * scale;
        if (soft_cap > 0.0f)
            s[v] = tanh(s[v] / soft_cap) * soft_cap;
        if (low > 0 || n < TILE) {
            const vi lane = lane_numbers() + v * W;
            s[v] = (lane >= low) & (lane < n) ? s[v] : splat(-__builtin_inff());
        }
        best = s[v] > best ? s[v] : best;
    }
    const float highest = max_lanes(best), m_new = *m > highest ? *m : highest;
    vf total = {};
#pragma GCC unroll 16
    for (int v = 0; v < TILE / W; v++) {
        const vf weight = exp_negative(s[v] - m_new);
        store(scores + v * W, weight);
        total += weight;
    }
    *change = *m - m_new;
    *sum = sum_lanes(total);
    *m = m_new;
}

// Where the keys and values of a tile lie, checked. Rows that nobody sees point to zeros.
template <class T> struct TileRows {
    const T *key[TILE], *value[TILE];
};

// Slots of positions first+low..first+n of a row; false where a block may not be read.
inline bool resolve(const AttentionArgs* a, int64_t token, int row, int64_t first, int low, int n, int64_t* slots) {
    int64_t block = -1;
    int64_t index = (first + low) / a->block_size, offset = (first + low) % a->block_size;
    for (int j = low; j < n; j++, offset++) {
        if (offset == a->block_size) {
            offset = 0;
            index++;
            block = -1;
        }
        if (block < 0) {
            block = index < a->table_width ? a->block_tables[(int64_t)row * a->table_width + index] : -1;
            if (block < 0 || block >= a->num_blocks) {
                refuse(a, token, block, FLAG_OUT_OF_RANGE);
                return false;
            }
            if (a->block_tags && a->block_tags[block] != a->row_tags[row]) {
                refuse(a, token, block, FLAG_WRONG_OWNER);
                return false;
            }
        }
        slots[j] = block * a->block_size + offset;
    }
    return true;
}

// Words word..word+W, or the `num` that are left, of W keys -> links [.., TILE].
template <bool WHOLE, class T, class Word>
inline void transpose_square(const T* const* rows, int word, int num, Word* key) {
    constexpr int EACH = 4 / sizeof(T);
    vf v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        const float* from = (const float*)(const void*)rows[i] + word;
        v[i] = WHOLE ? load(from) : load_upto(from, num);
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        if (!WHOLE && i >= num)
            break;
        Word* to = key + (word + i) * (EACH / Link<T>::EACH) * TILE;
        if constexpr (EACH == Link<T>::EACH) {
            __builtin_memcpy(to, v + i, sizeof(vf));
        } else {
            store(to, (vf)((vu)v[i] << 16));
            store(to + TILE, (vf)((vu)v[i] & 0xffff0000u));
        }
    }
}

// Keys [TILE rows of size] -> links [.., TILE], through words of 32 bits: one float, or two bfloat16. All that a register
// block of scores may touch is written.
template <class T, class Word> void transpose_keys(const T* const* rows, int low, int n, int size, Word* key) {
    constexpr int KEYS = KEY_VECTORS<1> * W;
    const int num_words = size * (int)sizeof(T) / 4, end = (n + KEYS - 1) / KEYS * KEYS;
    for (int first = low / KEYS * KEYS; first < end; first += W) {
        int word = 0;
        for (; word + W <= num_words; word += W)
            transpose_square<true>(rows + first, word, W, key + first);
        if (word < num_words)
            transpose_square<false>(rows + first, word, num_words - word, key + first);
    }
}

// Asks memory for the keys or values of a tile's rows low..n, into the second cache: the first has no room for a tile of
// all heads beside the one at work, and asking it cost half the speed.
template <class T> inline void fetch(const T* cache, const int64_t* slots, int low, int n, int64_t step, int64_t at, int size) {
    for (int j = low; j < n; j++)
        for (int i = 0; i < size; i += 64 / (int)sizeof(T))
            __builtin_prefetch(cache + slots[j] * step + at + i, 0, 2);
}

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

// Heads begin..end of one item. Several only where the item is a single token: what is read is then one piece of memory.
template <class T> void attend(const AttentionArgs* a, const int32_t* item, int begin, int end, float* scratch) {
    const int row = item[0], num_tokens = item[2] - item[1], size = a->head_size;
    const int group_size = a->num_heads / a->num_kv_heads, per_head = num_tokens * group_size;
    const int num_queries = per_head * (end - begin);
    const int64_t stride = padded(size), num = padded(num_queries_max(a)), step = (int64_t)a->num_kv_heads * size;
    const int64_t token = a->cu_seqlens[row] + item[1];
    const Reach reach{a->kv_lens[row] - (a->cu_seqlens[row + 1] - a->cu_seqlens[row]) + item[1] + 1, num_tokens, a->window};
    const int64_t seen_last = reach.seen_first + num_tokens - 1;
    const bool wide = sizeof(T) == 4 || per_head > QUERIES_MAX;  // values are widened once where several blocks use them
    typedef Link<T> L;
    typedef typename L::Word Word;
    static_assert(sizeof(Word) == sizeof(float), "one layout of the scratch");
    const int num_links = size / L::EACH;
    Word* key = (Word*)(void*)scratch;
    float* value = scratch + TILE * stride;
    float* zeros = value + TILE * stride;
    Word* query = (Word*)(void*)(zeros + stride);
    float* out = zeros + stride + num * stride;
    float* scores = out + num * stride;
    float* m = scores + num * TILE;
    float* l = m + num;
    float* change = l + num;
    float* sum = change + num;
    float* correction = sum + num;
    __builtin_memset(zeros, 0, sizeof(float) * (size_t)stride);
    __builtin_memset(out, 0, sizeof(float) * (size_t)(num_queries * stride));
    __builtin_memset(change, 0, sizeof(float) * (size_t)(2 * num));
    const auto place = [&](int q) {  // token and head of query q
        const int head = begin + q / per_head, within = q % per_head;
        return (token + within / group_size) * (int64_t)a->num_heads + head * group_size + within % group_size;
    };
    // Below `unseen` lies nothing that a token of this item sees: neither read nor asked for.
    const int64_t unseen = a->window && reach.seen_first > a->window ? reach.seen_first - a->window : 0;
    int64_t slots[2][TILE];
    int64_t first = unseen / TILE * TILE;
    int low = (int)(unseen - first), n = reach.n(first, num_tokens - 1);
    bool allowed = resolve(a, token, row, first, low, n, slots[0]);
    if (allowed)
        for (int head = begin; head < end; head++) {
            fetch((const T*)a->key_cache, slots[0], low, n, step, (int64_t)head * size, size);
            fetch((const T*)a->value_cache, slots[0], low, n, step, (int64_t)head * size, size);
        }
    for (int q = 0; q < num_queries; q++) {
        const int64_t at = place(q), head = at % a->num_heads;
        const T* from = (const T*)a->query + at / a->num_heads * a->query_stride + head * size;
        if constexpr (IN_PAIRS<T>)
            __builtin_memcpy(query + q * stride, from, sizeof(T) * (size_t)size);
        else
            widen(from, query + q * stride, size, false);
        m[q] = a->sinks ? a->sinks[head] : -__builtin_inff();
        l[q] = a->sinks ? 1.0f : 0.0f;
    }
    for (int side = 0; first < seen_last && allowed; side ^= 1) {
        const int64_t next = first + TILE;
        const int next_n = reach.n(next, num_tokens - 1);
        allowed = resolve(a, token, row, next, 0, next_n, slots[side ^ 1]);
        int t_begin = 0, t_end = num_tokens;
        while (reach.n(first, t_begin) == 0)
            t_begin++;
        while (reach.low(first, t_end - 1) == TILE)
            t_end--;
        const bool full = reach.n(first, t_begin) == TILE && reach.low(first, t_end - 1) == 0;
        for (int head = begin; head < end; head++) {
            TileRows<T> rows;
            for (int j = 0; j < TILE; j++) {
                const int64_t at = slots[side][j] * step + (int64_t)head * size;
                const bool seen = j >= low && j < n;
                rows.key[j] = seen ? (const T*)a->key_cache + at : (const T*)(const void*)zeros;
                rows.value[j] = seen ? (const T*)a->value_cache + at : (const T*)(const void*)zeros;
            }
            if (allowed)
                fetch((const T*)a->key_cache, slots[side ^ 1], 0, next_n, step, (int64_t)head * size, size);
            transpose_keys(rows.key, low, n, size, key);
            const int q_begin = (head - begin) * per_head + t_begin * group_size;
            const int q_end = (head - begin) * per_head + t_end * group_size;
            for (int q = q_begin; q < q_end; q += QUERIES_MAX)
                score<L>(q_end - q, query + q * stride, stride, key, num_links, low, n, scores + (int64_t)q * TILE);
            for (int q = q_begin; q < q_end; q++) {
                const int t = q % per_head / group_size;
                weigh(scores + (int64_t)q * TILE, reach.low(first, t), reach.n(first, t), a->scale, a->soft_cap,
                         m + q, change + q, sum + q);
            }
            for (int q = q_begin; q < q_end; q += W) {
                const int count = upto(q_end - q);
                const vf factor = exp_negative(load_upto(change + q, count));
                store_upto(correction + q, factor, count);
                store_upto(l + q, fma(load_upto(l + q, count), factor, load_upto(sum + q, count)), count);
            }
            if (allowed)
                fetch((const T*)a->value_cache, slots[side ^ 1], 0, next_n, step, (int64_t)head * size, size);
            const float* wide_rows[TILE];
            if (wide)
                for (int j = low; j < n; j++) {
                    if constexpr (sizeof(T) == 4) {
                        wide_rows[j] = rows.value[j];
                    } else {
                        widen(rows.value[j], value + j * stride, size, true);
                        wide_rows[j] = value + j * stride;
                    }
                }
            const int at_once = full ? q_end - q_begin : group_size;
            for (int q = q_begin; q < q_end; q += at_once) {
                const int t = q % per_head / group_size, from = reach.low(first, t), to = reach.n(first, t);
                for (int r = 0; r < at_once; r += QUERIES_MAX) {
                    const float* w = scores + (int64_t)(q + r) * TILE;
                    float* o = out + (q + r) * stride;
                    if (wide)
                        mix<float>(at_once - r, w, correction + q + r, wide_rows, from, to, size, o, stride);
                    else
                        mix<T>(at_once - r, w, correction + q + r, rows.value, from, to, size, o, stride);
                }
            }
        }
        first = next;
        low = 0;
        n = next_n;
    }
    for (int q = 0; q < num_queries; q++) {
        T* to = (T*)a->out + place(q) * size;
        if (allowed)
            store_output(out + q * stride, l[q], to, size);
        else
            __builtin_memset(to, 0, sizeof(T) * (size_t)size);
    }
}

// Pieces begin..end: key/value heads of items, an item's heads after each other.
void attention_any(const AttentionArgs* a, int64_t begin, int64_t end, float* scratch) {
    while (begin < end) {
        const int32_t* item = a->items + begin / a->num_kv_heads * 3;
        const int head = (int)(begin % a->num_kv_heads);
        const int64_t left = end - begin;
        int num = item[2] - item[1] == 1 ? a->num_kv_heads - head : 1;
        num = num < left ? num : (int)left;
        a->dtype == BFLOAT16 ? attend<bf16>(a, item, head, head + num, scratch)
                             : attend<float>(a, item, head, head + num, scratch);
        begin += num;
    }
}

} // namespace
