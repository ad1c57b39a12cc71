// Paged attention, for decode rows and prefill chunks alike: keys and values are read once for all query heads that share
// them. Why a row's bits are its own, whoever shares the pass:
//
//     score   one chain of multiply-adds over the head's channels, from the first to the last (scores.h)
//     softmax in absolute tiles of TILE keys from the sequence's start: maximum and sum over a tile's lanes in a fixed tree
//     output  corrected once a tile, then one chain of multiply-adds over the keys that this token sees, in their order (values.h)
//
// Where bfloat16 has an instruction of its own, a link of a score's chain is a pair of channels.
//
// Register blocks of several queries only put separate chains side by side. Keys that a token does not see are dropped from
// its scores by selection and are no links of its chains: a NaN there cannot reach it.
#pragma once
#include "scores.h"
#include "tiles.h"
#include "values.h"

namespace {

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
    return stride * 2 * TILE + num * (2 * stride + TILE + 5);
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

// Heads begin..end of one item. Several only where the item is a single token: what is read is then one piece of memory.
// `later` is an item whose first tile is asked for during this one's last, or null.
template <class T>
void attend(const AttentionArgs* a, const int32_t* item, const int32_t* later, int begin, int end, float* scratch) {
    const Start start(a, item);
    const Reach& reach = start.reach;
    const int row = start.row, num_tokens = start.num_tokens, size = a->head_size;
    const int group_size = a->num_heads / a->num_kv_heads, per_head = num_tokens * group_size;
    const int num_queries = per_head * (end - begin);
    const int64_t stride = padded(size), num = padded(num_queries_max(a)), token = start.token;
    const int64_t seen_last = reach.seen_first + num_tokens - 1;
    const bool wide = sizeof(T) == 4 || per_head > QUERIES_MAX;  // values are widened once where several blocks use them
    typedef Link<T> L;
    typedef typename L::Word Word;
    static_assert(sizeof(Word) == sizeof(float), "one layout of the scratch");
    const int num_links = size / L::EACH;
    Word* key = (Word*)(void*)scratch;
    float* value = scratch + TILE * stride;
    Word* query = (Word*)(void*)(value + TILE * stride);
    float* out = value + TILE * stride + num * stride;
    float* scores = out + num * stride;
    float* m = scores + num * TILE;
    float* l = m + num;
    float* change = l + num;
    float* sum = change + num;
    float* correction = sum + num;
    __builtin_memset(out, 0, sizeof(float) * (size_t)(num_queries * stride));
    __builtin_memset(change, 0, sizeof(float) * (size_t)(2 * num));
    const auto place = [&](int q) {  // token and head of query q
        const int head = begin + q / per_head, within = q % per_head;
        return (token + within / group_size) * (int64_t)a->num_heads + head * group_size + within % group_size;
    };
    TileRows<T> tiles[2];
    int64_t first = start.first;
    int low = start.low, n = start.n;
    bool allowed = resolve(a, token, row, first, low, n, &tiles[0]);
    for (int j = low; allowed && j < n; j++) {
        fetch(tiles[0].key[j] + begin * size, (int64_t)sizeof(T) * (end - begin) * size);
        fetch(tiles[0].value[j] + begin * size, (int64_t)sizeof(T) * (end - begin) * size);
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
        const TileRows<T>& rows = tiles[side];
        const TileRows<T>* ahead = &rows;  // where nothing comes: what is there already is soon asked for
        if (next_n > 0) {
            allowed = resolve(a, token, row, next, 0, next_n, &tiles[side ^ 1]);
            if (allowed)
                ahead = &tiles[side ^ 1];
        } else if (later) {
            const Start other(a, later);
            if (resolve(a, other.token, other.row, other.first, other.low, other.n, &tiles[side ^ 1]))
                ahead = &tiles[side ^ 1];
        }
        int t_begin = 0, t_end = num_tokens;
        while (reach.n(first, t_begin) == 0)
            t_begin++;
        while (reach.low(first, t_end - 1) == TILE)
            t_end--;
        const bool full = reach.n(first, t_begin) == TILE && reach.low(first, t_end - 1) == 0;
        // Queries that see something of the tile lie side by side: several heads are here only for a single token. Their
        // maxima and sums come before any output, so that many short chains run at once and not a few, one head after
        // the other.
        const int num_at_once = (t_end - t_begin) * group_size, q_first = t_begin * group_size;
        const int q_last = (end - begin - 1) * per_head + t_end * group_size;
        for (int head = begin; head < end; head++) {
            const int64_t at = (int64_t)head * size;
            const int q_begin = (head - begin) * per_head + q_first, q_end = q_begin + num_at_once;
            if (num_at_once <= FEW) {
                score_few<T>(num_at_once, rows.key, ahead->key, at, query + q_begin * stride, stride, size,
                             scores + (int64_t)q_begin * TILE);
                continue;
            }
            turn_keys(rows.key, ahead->key, at, low, n, size, key);
            for (int q = q_begin; q < q_end; q += QUERIES_MAX)
                score<L>(q_end - q, query + q * stride, stride, key, num_links, low, n, scores + (int64_t)q * TILE);
        }
        for (int q = q_first; q < q_last; q++) {
            const int t = q % per_head / group_size;
            weigh(scores + (int64_t)q * TILE, reach.low(first, t), reach.n(first, t), a->scale, a->soft_cap, m + q, change + q,
                  sum + q);
        }
        for (int q = q_first; q < q_last; q += W) {
            const int count = upto(q_last - q);
            const vf factor = exp_negative(load_upto(change + q, count));
            store_upto(correction + q, factor, count);
            store_upto(l + q, fma(load_upto(l + q, count), factor, load_upto(sum + q, count)), count);
        }
        for (int head = begin; head < end; head++) {
            const int64_t at = (int64_t)head * size;
            const int q_begin = (head - begin) * per_head + q_first, q_end = q_begin + num_at_once;
            const float* wide_rows[TILE];
            for (int j = low; wide && j < n; j++) {
                fetch(ahead->value[j] + at, (int64_t)sizeof(T) * size);
                if constexpr (sizeof(T) == 4) {
                    wide_rows[j] = rows.value[j] + at;
                } else {
                    widen(rows.value[j] + at, value + j * stride, size, true);
                    wide_rows[j] = value + j * stride;
                }
            }
            const int at_once = full ? num_at_once : group_size;
            for (int q = q_begin; q < q_end; q += at_once) {
                const int t = q % per_head / group_size, from = reach.low(first, t), to = reach.n(first, t);
                for (int r = 0; r < at_once; r += QUERIES_MAX) {
                    const float* w = scores + (int64_t)(q + r) * TILE;
                    float* o = out + (q + r) * stride;
                    if (wide)
                        mix<float>(at_once - r, w, correction + q + r, wide_rows, wide_rows, 0, from, to, size, o, stride);
                    else
                        mix<T>(at_once - r, w, correction + q + r, rows.value, ahead->value, at, from, to, size, o, stride);
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
        const int64_t index = begin / a->num_kv_heads, later_index = index + a->items_apart;
        const int32_t* item = a->items + index * 3;
        const int head = (int)(begin % a->num_kv_heads);
        const int64_t left = end - begin;
        int num = item[2] - item[1] == 1 ? a->num_kv_heads - head : 1;
        num = num < left ? num : (int)left;
        const bool is_whole = num == a->num_kv_heads;
        const int32_t* later = is_whole && later_index < a->num_items ? a->items + later_index * 3 : nullptr;
        a->dtype == BFLOAT16 ? attend<bf16>(a, item, later, head, head + num, scratch)
                             : attend<float>(a, item, later, head, head + num, scratch);
        begin += num;
    }
}

} // namespace
