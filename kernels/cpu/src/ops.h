// The library's face: plain C structs of raw pointers, mirrored in kernels/cpu/library.py. kernels/reference.py says
// what each op means. T tokens, R rows, Hq query heads, Hkv key/value heads, D head size, N blocks.
#pragma once
#include <stddef.h>
#include <stdint.h>

enum { FLOAT32 = 0, BFLOAT16 = 1 };

// Bits of `flags`, at the token that asked (of an attention item: its first): the host must look before any output
// leaves. `refused` holds a block that such a token asked for.
enum { FLAG_OUT_OF_RANGE = 1, FLAG_WRONG_OWNER = 2 };

struct NormArgs {
    const void* x;          // [T, H]
    const void* weight;     // [H]
    const float* residual;  // [T, H] or null
    float* total;           // [T, H] x + residual; may be `residual`
    void* out;              // [T, H]
    int64_t num_tokens, size;
    float epsilon;
    int32_t dtype;
};

enum { ACTIVATION_SILU = 0, ACTIVATION_GELU_TANH = 1, ACTIVATION_GELU_ERF = 2 };

struct ActivationArgs {
    const void* gate_up;  // [T, 2 * I]
    void* out;            // [T, I]
    int64_t num_tokens, size;
    int32_t dtype, kind;
};

struct RopeArgs {
    void* qkv;            // [T, Hq + 2 * Hkv, D]; the queries are turned in place
    const float* cos;     // [T, D / 2], or null: queries and keys come already turned
    const float* sin;
    void* key_cache;      // [N, block_size, Hkv, D]
    void* value_cache;
    const int64_t* slots;       // [T]
    const int64_t* token_tags;  // [T] tag of the token's domain, or null
    const int64_t* block_tags;  // [N] tag of the block's owner, or null
    int32_t* flags;             // [T]
    int64_t* refused;           // [T]
    int64_t num_tokens, num_blocks;
    int32_t num_heads, num_kv_heads, head_size, block_size, dtype;
};

struct AttentionArgs {
    const void* query;  // token t, head h at t * query_stride + h * D
    const void* key_cache;
    const void* value_cache;
    void* out;                  // [T, Hq, D]
    const int32_t* cu_seqlens;  // [R + 1]
    const int32_t* kv_lens;     // [R]
    const int32_t* block_tables;  // [R, table_width]
    const int32_t* items;         // [num_items, 3] row and a range of its new tokens
    const int64_t* row_tags;      // [R] or null
    const int64_t* block_tags;    // [N] or null
    int32_t* flags;               // [T]
    int64_t* refused;             // [T]
    int64_t query_stride, num_blocks, num_items;
    const float* sinks;           // [Hq] one more logit in each head's denominator, or null
    int32_t table_width, num_heads, num_kv_heads, head_size, block_size, dtype;
    float scale, soft_cap;        // 0: no cap
    int32_t item_tokens_max, window;  // 0: no window
    int32_t items_apart;  // from an item to the next that the same thread is likely to get: set by the library
};

struct ProductArgs {
    const void* x;        // [T, in] in the weight's dtype
    const void* weight;   // packed: see product.h
    const void* bias;     // [out], [2 * out] where gated, in the weight's dtype, or null
    void* y;              // [T, out]
    const void* x_ready;  // x as the tiles read it: set by the library
    int64_t num_rows, num_inputs, num_outputs;
    int32_t weight_dtype, y_dtype;
    int32_t gated;  // y = silu(gate) * up, of a panel's left and right half of columns
};

struct BlocksArgs {
    void* keys;                // [N, block_bytes]
    void* values;              // [N, block_bytes]
    const int64_t* block_ids;  // [B]
    uint64_t* digests;         // [B, 2] or null
    int64_t num_blocks, num_ids, block_bytes;
    uint64_t key[2];
    int32_t fill;  // a byte
};

// Of logits, the largest of each row: largest first, the smallest column first among equals.
struct TopArgs {
    const float* logits;  // [S, V]
    int64_t* ids;         // [S, count]; not written where a row is not finite
    uint8_t* finite;      // [S] whether all of the row's numbers are
    int64_t num_rows, num_columns, count;  // 1 <= count <= num_columns
};

// What one instruction set offers: each works on a range of independent pieces.
struct Ops {
    void (*rms_norm)(const NormArgs*, int64_t begin, int64_t end);
    void (*activate_and_mul)(const ActivationArgs*, int64_t begin, int64_t end);
    void (*rope_and_store)(const RopeArgs*, int64_t begin, int64_t end);
    int64_t (*attention_scratch)(const AttentionArgs*);  // floats
    void (*attention)(const AttentionArgs*, int64_t begin, int64_t end, float* scratch);
    int64_t (*ready_bytes)(const ProductArgs*);
    void (*make_ready)(const ProductArgs*, int64_t begin, int64_t end);  // rows
    void (*product)(const ProductArgs*, int64_t begin, int64_t end);     // panels
    // Largest of each group of columns (src/top.h), [top_groups]; whether all numbers are finite.
    bool (*group_maxima)(const float* row, int64_t num_columns, int64_t group_vectors, float* maxima);
    // Sortable keys of the columns that are not below a threshold; their number.
    int64_t (*at_least)(const float* row, int64_t num_columns, float threshold, uint64_t* keys);
    int32_t lanes;          // of a vector
    int32_t panel;          // columns
    int32_t bf16_inputs;    // inputs in a step of a panel of bfloat16 weights: 1, or pairs filled up to this many
};


namespace {

template <class Args> inline void refuse(const Args* a, int64_t token, int64_t block, int32_t bit) {
    __atomic_store_n(a->refused + token, block, __ATOMIC_RELAXED);
    __atomic_fetch_or(a->flags + token, bit, __ATOMIC_RELAXED);
}

} // namespace
