// The ops for one instruction set: compiled once for each, with -DOPS=<name of the table> and that set's flags.
//
// The rule that makes rows independent: every output element is one chain of operations whose order depends on its own
// row only. Reductions run in a fixed tree over lanes and in absolute tiles of TILE keys from the sequence's start, so
// that neither chunking nor company nor placement nor the number of threads can reorder a sum.
#include "attention.h"
#include "ops.h"
#include "product.h"
#include "vec.h"

namespace {

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
            squares = fma(v, v, squares);
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
        store_upto(to + i, fma(first, c, -(second * s)), n);
        store_upto(to + half + i, fma(second, c, first * s), n);
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

void rms_norm_any(const NormArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? rms_norm<bf16>(a, begin, end) : rms_norm<float>(a, begin, end);
}

void silu_and_mul_any(const SiluArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? silu_and_mul<bf16>(a, begin, end) : silu_and_mul<float>(a, begin, end);
}

void rope_and_store_any(const RopeArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? rope_and_store<bf16>(a, begin, end) : rope_and_store<float>(a, begin, end);
}

} // namespace

extern const Ops OPS;
const Ops OPS = {rms_norm_any,  silu_and_mul_any,        rope_and_store_any, attention_scratch, attention_any,
                 ready_bytes,   bf16_weights::make_ready, product_any,        PANEL,             bf16_weights::INPUTS};
