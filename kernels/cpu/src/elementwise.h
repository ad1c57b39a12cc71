// Ops whose every output belongs to one token: norm, activations, rotary positions with the write into the cache.
#pragma once
#include "activated.h"
#include "ops.h"
#include "vec.h"

namespace {

constexpr int SUMS = 4;  // chains that share a norm's squares; part of what a bit is

template <class T> void rms_norm(const NormArgs* a, int64_t begin, int64_t end) {
    const int64_t size = a->size;
    const T* weight = (const T*)a->weight;
    for (int64_t token = begin; token < end; token++) {
        const T* x = (const T*)a->x + token * size;
        const float* residual = a->residual ? a->residual + token * size : nullptr;
        float* total = a->total + token * size;
        T* out = (T*)a->out + token * size;
        vf squares[SUMS] = {};
        const auto add = [&](int64_t i, vf v, vf& sum, int n) {
            if (residual)
                v += load_upto(residual + i, n);
            store_upto(total + i, v, n);
            sum = fma(v, v, sum);
        };
        int64_t i = 0;
        for (; i + SUMS * W <= size; i += SUMS * W)
#pragma GCC unroll 4
            for (int s = 0; s < SUMS; s++)
                add(i + s * W, load(x + i + s * W), squares[s], W);
        for (int s = 0; i < size; i += W, s++) {
            const int n = upto(size - i);
            add(i, load_upto(x + i, n), squares[s], n);
        }
        const float sum = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3]));
        const vf scale = splat(1.0f / __builtin_sqrtf(sum / (float)size + a->epsilon));
        for (i = 0; i + W <= size; i += W)
            store(out + i, load(total + i) * scale * load(weight + i));
        if (i < size) {
            const int n = (int)(size - i);
            store_part(out + i, load_part(total + i, n) * scale * load_part(weight + i, n), n);
        }
    }
}

template <class T, int32_t KIND> void activate_and_mul(const ActivationArgs* a, int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; token++) {
        const T* gate = (const T*)a->gate_up + token * 2 * a->size;
        const T* up = gate + a->size;
        T* out = (T*)a->out + token * a->size;
        int64_t i = 0;
        for (; i + W <= a->size; i += W)
            store(out + i, activated(load(gate + i), KIND) * load(up + i));
        if (i < a->size) {
            const int n = (int)(a->size - i);
            store_part(out + i, activated(load_part(gate + i, n), KIND) * load_part(up + i, n), n);
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

constexpr int64_t SLOTS_AHEAD = 4;  // asked for before they are written: each lies somewhere else, seldom in a cache

// Asks for the memory of a token's slot, to write it.
template <class T> inline void fetch_slot(const RopeArgs* a, int64_t token) {
    const int64_t slot = a->slots[token], size = (int64_t)a->num_kv_heads * a->head_size;
    if (slot < 0 || slot / a->block_size >= a->num_blocks)
        return;
    for (int64_t i = 0; i < size; i += 64 / (int64_t)sizeof(T)) {
        __builtin_prefetch((T*)a->key_cache + slot * size + i, 1, 3);
        __builtin_prefetch((T*)a->value_cache + slot * size + i, 1, 3);
    }
}

template <class T> void rope_and_store(const RopeArgs* a, int64_t begin, int64_t end) {
    const int size = a->head_size, half = size / 2;
    const int64_t width = (int64_t)(a->num_heads + 2 * a->num_kv_heads) * size;
    for (int64_t token = begin; token < end && token < begin + SLOTS_AHEAD; token++)
        fetch_slot<T>(a, token);
    for (int64_t token = begin; token < end; token++) {
        if (token + SLOTS_AHEAD < end)
            fetch_slot<T>(a, token + SLOTS_AHEAD);
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

template <int32_t KIND> void activate_and_mul_as(const ActivationArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? activate_and_mul<bf16, KIND>(a, begin, end) : activate_and_mul<float, KIND>(a, begin, end);
}

void activate_and_mul_any(const ActivationArgs* a, int64_t begin, int64_t end) {
    switch (a->kind) {
    case ACTIVATION_SILU: activate_and_mul_as<ACTIVATION_SILU>(a, begin, end); break;
    case ACTIVATION_GELU_TANH: activate_and_mul_as<ACTIVATION_GELU_TANH>(a, begin, end); break;
    default: activate_and_mul_as<ACTIVATION_GELU_ERF>(a, begin, end);
    }
}

void rope_and_store_any(const RopeArgs* a, int64_t begin, int64_t end) {
    a->dtype == BFLOAT16 ? rope_and_store<bf16>(a, begin, end) : rope_and_store<float>(a, begin, end);
}

} // namespace
