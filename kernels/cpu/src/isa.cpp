// The ops for one instruction set: compiled once for each, with -DOPS=<name of the table> and that set's flags.
//
// The rule that makes rows independent: every output element is one chain of operations whose order depends on its own
// row only. Reductions run in a fixed tree over lanes and in absolute tiles of TILE keys from the sequence's start, so
// that neither chunking nor company nor placement nor the number of threads can reorder a sum.
#include "ops.h"
#include "product.h"
#include "vec.h"

namespace {

constexpr int TILE = 32;  // keys; part of what a bit is, never tuned per call
constexpr int PAD = 16;   // heads in scratch are padded to a multiple of this with zeros
constexpr int GROUP = 4;  // query heads that share a pass over a tile
constexpr int SPAN = W == 16 ? 4 : 2;  // vectors of a value row kept in registers
static_assert(TILE % W == 0 && PAD % W == 0, "a tile and a padded head are whole vectors");

inline int padded(int size) {
    return (size + PAD - 1) / PAD * PAD;
}

template <class Args> inline void refuse(const Args* a, int64_t token, int64_t block, int32_t bit) {
    __atomic_store_n(a->refused + token, block, __ATOMIC_RELAXED);
    __atomic_fetch_or(a->flags + token, bit, __ATOMIC_RELAXED);
}

inline int upto(int64_t left) {
    return left < W ? (int)left : W;
}

template <class T> void rms_norm(const NormArgs* a, int64_t begin, int64_t end) {
    const int64_t size = a->size;
    const T* weight = (const T*)a->weight;
    for (int64_t token = begin; token < end; token++) {
        const T* x = (const T*)a->x + token * size;
        const float* residual = a->residual ? a->residual + token * size : nullptr;
        float* total = a->total + token * size;
        T* out = (T*)a->out + token * size;
        vf squares = {};
        for (int64_t i = 0; i < size; i += W) {
            const int n = upto(size - i);
            vf v = load_upto(x + i, n);
            if (residual)
                v += load_upto(residual + i, n);
            store_upto(total + i, v, n);
            squares += v * v;
        }
        const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / (float)size + a->epsilon);
        for (int64_t i = 0; i < size; i += W) {
            const int n = upto(size - i);
            store_upto(out + i, load_upto(total + i, n) * scale * load_upto(weight + i, n), n);
        }
    }
}

template <class T> void silu_and_mul(const SiluArgs* a, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
        const T* gate = (const T*)a->gate_up + token * 2 * a->size;
        const T* up = gate + a->size;
        T* out = (T*)a->out + token * a->size;
        for (int64_t i = 0; i < a->size; i += W) {
            const int n = upto(a->size - i);
            const vf g = load_upto(gate + i, n);
            store_upto(out + i, g / (1.0f + exp(-g)) * load_upto(up + i, n), n);
        }
    }
}

template <class T> void turn(const T* from, T* to, const float* cos, const float* sin, int half) {
    for (int i = 0; i < half; i += W) {
        const int n = upto(half - i);
        const vf c = load_upto(cos + i, n), s = load_upto(sin + i, n);
        const vf first = load_upto(from + i, n), second = load_upto(from + half + i, n);
        store_upto(to + i, first * c - second * s, n);
        store_upto(to + half + i, second * c + first * s, n);
    }
}

template <class T> void rope_and_store(const RopeArgs* a, int64_t begin, int64_t end) {
    const int size = a->head_size, half = size / 2;
    const int64_t width = (int64_t)(a->num_heads + 2 * a->num_kv_heads) * size;
    for (int64_t token = begin; token < end; token++) {
        T* query = (T*)a->qkv + token * width;
        const T* key = query + (int64_t)a->num_heads * size;
        const T* value = key + (int64_t)a->num_kv_heads * size;
        const float* cos = a->cos ? a->cos + token * half : nullptr;
        const float* sin = a->cos ? a->sin + token * half : nullptr;
        for (int head = 0; cos && head < a->num_heads; head++)
            turn(query + (int64_t)head * size, query + (int64_t)head * size, cos, sin, half);
        const int64_t slot = a->slots[token];
        if (slot < 0 || slot / a->block_size >= a->num_blocks) {
            refuse(a, token, slot < 0 ? -1 : slot / a->block_size, FLAG_OUT_OF_RANGE);
            continue;
        }
        if (a->block_tags && a->block_tags[slot / a->block_size] != a->token_tags[token]) {
            refuse(a, token, slot / a->block_size, FLAG_WRONG_OWNER);
            continue;
        }
        T* key_slot = (T*)a->key_cache + slot * a->num_kv_heads * size;
        T* value_slot = (T*)a->value_cache + slot * a->num_kv_heads * size;
        const size_t num_bytes = sizeof(T) * (size_t)a->num_kv_heads * (size_t)size;
        for (int head = 0; cos && head < a->num_kv_heads; head++)
            turn(key + (int64_t)head * size, key_slot + (int64_t)head * size, cos, sin, half);
        if (!cos)
            __builtin_memcpy(key_slot, key, num_bytes);
        __builtin_memcpy(value_slot, value, num_bytes);
    }
}

template <class T> void widen(const T* from, float* to, int size, int stride) {
    int i = 0;
    for (; i + W <= size; i += W)
        store(to + i, load(from + i));
    if (i < size) {
        store(to + i, load_part(from + i, size - i));
        i += W;
    }
    for (; i < stride; i += W)
        store(to + i, vf{});
}

// One tile for R query heads that see its keys low..n: softmax state m, l and the sums in `out` move on.
template <int R>
void tile_step(const float* query, float* out, float* m, float* l, const float* key, const float* value, int low, int n,
               int stride, float scale, float soft_cap) {
    alignas(64) float weights[R][TILE];
    float correction[R];
    for (int r = 0; r < R; r++) {
        const float* q = query + r * stride;
        vf best = splat(-__builtin_inff());
        vf scores[TILE / W];
        for (int group = 0; group < TILE / W; group++) {
            if (group * W >= n || group * W + W <= low) {
                scores[group] = splat(-__builtin_inff());
                continue;
            }
            vf sums[W] = {};
            for (int c = 0; c < stride; c += W) {
                const vf part = load(q + c);
                for (int i = 0; i < W; i++)
                    sums[i] = fma(part, load(key + (group * W + i) * stride + c), sums[i]);
            }
            vi lane;
            for (int i = 0; i < W; i++)
                lane[i] = group * W + i;
            vf score = sum_each<W>(sums) * scale;
            if (soft_cap > 0.0f)
                score = tanh(score / soft_cap) * soft_cap;
            scores[group] = (lane >= low) & (lane < n) ? score : splat(-__builtin_inff());
            best = scores[group] > best ? scores[group] : best;
        }
        const float highest = max_lanes(best);
        const float m_new = m[r] > highest ? m[r] : highest;
        vf total = {};
        for (int group = 0; group < TILE / W; group++) {
            const vf weight = exp(scores[group] - m_new);
            store(weights[r] + group * W, weight);
            total += weight;
        }
        correction[r] = exp(splat(m[r] - m_new))[0];
        l[r] = l[r] * correction[r] + sum_lanes(total);
        m[r] = m_new;
    }
    int c = 0;
    for (; c + SPAN * W <= stride; c += SPAN * W) {
        vf sums[R][SPAN];
        for (int r = 0; r < R; r++)
            for (int s = 0; s < SPAN; s++)
                sums[r][s] = load(out + r * stride + c + s * W) * correction[r];
        for (int j = low; j < n; j++) {
            const float* v = value + j * stride + c;
            for (int s = 0; s < SPAN; s++) {
                const vf part = load(v + s * W);
                for (int r = 0; r < R; r++)
                    sums[r][s] = fma(part, splat(weights[r][j]), sums[r][s]);
            }
        }
        for (int r = 0; r < R; r++)
            for (int s = 0; s < SPAN; s++)
                store(out + r * stride + c + s * W, sums[r][s]);
    }
    for (; c < stride; c += W)
        for (int r = 0; r < R; r++) {
            vf sum = load(out + r * stride + c) * correction[r];
            for (int j = low; j < n; j++)
                sum = fma(load(value + j * stride + c), splat(weights[r][j]), sum);
            store(out + r * stride + c, sum);
        }
}

// Keys and values of positions first+low..first+n of a row, as floats; false where a block may not be read.
template <class T>
bool gather(const AttentionArgs* a, int64_t token, int row, int head, int64_t first, int low, int n, float* key, float* value,
            int stride) {
    const int size = a->head_size;
    int64_t block = -1;
    int index = (int)((first + low) / a->block_size), offset = (int)((first + low) % a->block_size);
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
        const int64_t at = ((block * a->block_size + offset) * a->num_kv_heads + head) * size;
        widen((const T*)a->key_cache + at, key + j * stride, size, stride);
        widen((const T*)a->value_cache + at, value + j * stride, size, stride);
    }
    for (int i = 0; i < low * stride; i++)  // scored with the rest of their vector, then masked
        key[i] = 0.0f;
    for (int i = n * stride; i < TILE * stride; i++)
        key[i] = 0.0f;
    return true;
}

// Asks memory for what gather() will read of positions first..first+n; of a block that it would refuse, nothing.
template <class T> void fetch(const AttentionArgs* a, int row, int head, int64_t first, int n) {
    const int64_t bytes = (int64_t)sizeof(T) * a->head_size, step = bytes * a->num_kv_heads;
    for (int64_t at = first, end = first + n; at < end;) {
        const int64_t index = at / a->block_size, offset = at % a->block_size;
        const int64_t left = end - at, in_block = a->block_size - offset, num = left < in_block ? left : in_block;
        const int64_t block = index < a->table_width ? a->block_tables[(int64_t)row * a->table_width + index] : -1;
        at += num;
        if (block < 0 || block >= a->num_blocks || (a->block_tags && a->block_tags[block] != a->row_tags[row]))
            continue;
        const int64_t start = (block * a->block_size + offset) * step + head * bytes;
        for (int64_t j = 0; j < num; j++)
            for (int64_t line = 0; line < bytes; line += 64) {
                __builtin_prefetch((const char*)a->key_cache + start + j * step + line);
                __builtin_prefetch((const char*)a->value_cache + start + j * step + line);
            }
    }
}

template <class T> void attend(const AttentionArgs* a, int64_t piece, float* scratch) {
    const int32_t* item = a->items + piece / a->num_kv_heads * 3;
    const int head = (int)(piece % a->num_kv_heads), row = item[0], num_tokens = item[2] - item[1];
    const int group_size = a->num_heads / a->num_kv_heads, size = a->head_size, stride = padded(size);
    const int num_queries = num_tokens * group_size;
    const int64_t token = a->cu_seqlens[row] + item[1];
    const int64_t seen_first = a->kv_lens[row] - (a->cu_seqlens[row + 1] - a->cu_seqlens[row]) + item[1] + 1;
    const int64_t seen_last = seen_first + num_tokens - 1;
    float* key = scratch;
    float* value = key + TILE * stride;
    float* query = value + TILE * stride;
    float* out = query + num_queries * stride;
    float* m = out + num_queries * stride;
    float* l = m + num_queries;
    for (int q = 0; q < num_queries; q++) {
        const int64_t from = (token + q / group_size) * a->query_stride + (int64_t)(head * group_size + q % group_size) * size;
        widen((const T*)a->query + from, query + q * stride, size, stride);
        for (int i = 0; i < stride; i++)
            out[q * stride + i] = 0.0f;
        m[q] = a->sinks ? a->sinks[head * group_size + q % group_size] : -__builtin_inff();
        l[q] = a->sinks ? 1.0f : 0.0f;
    }
    // Below `unseen` lies nothing that a token of this item sees: neither read nor asked for.
    const int64_t unseen = a->window && seen_first > a->window ? seen_first - a->window : 0;
    bool allowed = true;
    fetch<T>(a, row, head, unseen, (int)(seen_last - unseen < TILE ? seen_last - unseen : TILE));
    for (int64_t first = unseen / TILE * TILE; first < seen_last && allowed; first += TILE) {
        const int num_keys = (int)(seen_last - first < TILE ? seen_last - first : TILE);
        const int num_unseen = (int)(unseen > first ? unseen - first : 0);
        allowed = gather<T>(a, token, row, head, first, num_unseen, num_keys, key, value, stride);
        const int64_t left = seen_last - first - TILE;
        fetch<T>(a, row, head, first + TILE, left < 0 ? 0 : (int)(left < TILE ? left : TILE));
        for (int t = 0; t < num_tokens && allowed; t++) {
            const int64_t seen = seen_first + t - first;
            if (seen <= 0)
                continue;
            const int n = (int)(seen < TILE ? seen : TILE);
            const int low = a->window && seen > a->window ? (int)(seen - a->window < TILE ? seen - a->window : TILE) : 0;
            if (low == TILE)
                continue;
            for (int g = 0; g < group_size; g += GROUP) {
                const int q = t * group_size + g, left = group_size - g;
                const float* qs = query + q * stride;
                float* os = out + q * stride;
                switch (left < GROUP ? left : GROUP) {
                case 1: tile_step<1>(qs, os, m + q, l + q, key, value, low, n, stride, a->scale, a->soft_cap); break;
                case 2: tile_step<2>(qs, os, m + q, l + q, key, value, low, n, stride, a->scale, a->soft_cap); break;
                case 3: tile_step<3>(qs, os, m + q, l + q, key, value, low, n, stride, a->scale, a->soft_cap); break;
                default: tile_step<4>(qs, os, m + q, l + q, key, value, low, n, stride, a->scale, a->soft_cap);
                }
            }
        }
    }
    for (int q = 0; q < num_queries; q++) {
        T* to = (T*)a->out + ((token + q / group_size) * a->num_heads + head * group_size + q % group_size) * size;
        for (int i = 0; i < size; i += W) {
            const int n = upto(size - i);
            store_upto(to + i, allowed ? load(out + q * stride + i) / l[q] : vf{}, n);
        }
    }
}

void rms_norm_any(const NormArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? rms_norm<bf16>(a, begin, end) : rms_norm<float>(a, begin, end);
}

void silu_and_mul_any(const SiluArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? silu_and_mul<bf16>(a, begin, end) : silu_and_mul<float>(a, begin, end);
}

void rope_and_store_any(const RopeArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? rope_and_store<bf16>(a, begin, end) : rope_and_store<float>(a, begin, end);
}

void attention_any(const AttentionArgs* a, int64_t begin, int64_t end, float* scratch) {
    for (int64_t piece = begin; piece < end; piece++)
        a->dtype == BFLOAT16 ? attend<bf16>(a, piece, scratch) : attend<float>(a, piece, scratch);
}

} // namespace

extern const Ops OPS;
const Ops OPS = {rms_norm_any, silu_and_mul_any,   rope_and_store_any, attention_any, ready_bytes,
                 bf16_weights::make_ready, product_any, PANEL, bf16_weights::INPUTS};
