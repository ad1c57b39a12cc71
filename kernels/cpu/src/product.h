// Matrix products y = x W^T (+ bias) with packed weights. Every output element is one chain over the inputs, from the
// first to the last, one multiply-add each; bias and rounding come once, at the end. Rows and columns of a register tile
// are separate chains, so a row's bits cannot depend on how many rows there are, or on who computes which columns.
//
// The weights lie in panels of PANEL columns, inputs outside, columns inside (kernels/cpu/product.py packs them). A step
// of a bfloat16 panel is W words: column i in the low half, column W + i in the high half, so that a shift and a mask
// make two vectors of floats.
#pragma once
#include "ops.h"
#include "vec.h"

namespace {

constexpr int PANEL = 2 * W;
constexpr int ROWS_MAX = W == 16 ? 12 : 6;  // rows of a tile: their sums, a step's weights and an input fit the registers

// One row is bound by memory alone and takes several panels at once, because one panel's few chains would wait for
// themselves. From two rows on the panels come one after the other, so that what is fetched ahead is the next panel.
template <int M> constexpr int PANELS_AT_ONCE = M == 1 ? 4 : 1;
template <int M> constexpr int AHEAD = M == 1 ? 512 : 3072;  // bytes; measured on Zen 4

template <class T> struct Panel;

template <> struct Panel<bf16> {
    typedef uint32_t Word;
    static constexpr int64_t STEP = W;

    static void load(const Word* p, vf* columns) {
        vu words;
        __builtin_memcpy(&words, p, sizeof words);
        columns[0] = (vf)(words << 16);
        columns[1] = (vf)(words & 0xffff0000u);
    }
};

template <> struct Panel<float> {
    typedef float Word;
    static constexpr int64_t STEP = 2 * W;

    static void load(const Word* p, vf* columns) {
        columns[0] = ::load(p);
        columns[1] = ::load(p + W);
    }
};

// Rows row..row+M times panels panel..panel+P.
template <int M, int P, class Weight, class Y> void product_tile(const ProductArgs* a, int64_t row, int64_t panel) {
    typedef Panel<Weight> Packed;
    const int64_t num_inputs = a->num_inputs, panel_words = num_inputs * Packed::STEP;
    const float* x = a->x_wide + row * num_inputs;
    const typename Packed::Word* weight = (const typename Packed::Word*)a->weight + panel * panel_words;
    vf sums[M][2 * P];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < 2 * P; v++)
            sums[m][v] = vf{};
    for (int64_t k = 0; k < num_inputs; k++) {
        vf columns[2 * P];
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) {
            const typename Packed::Word* step = weight + p * panel_words + k * Packed::STEP;
            __builtin_prefetch((const char*)step + AHEAD<M>);
            Packed::load(step, columns + 2 * p);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const vf input = splat(x[m * num_inputs + k]);
#pragma GCC unroll 16
            for (int v = 0; v < 2 * P; v++)
                sums[m][v] = fma(input, columns[v], sums[m][v]);
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < 2 * P; v++) {
        const int64_t column = panel * PANEL + v * W, left = a->num_outputs - column;
        if (left <= 0)
            break;
        const int n = left < W ? (int)left : W;
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            vf sum = sums[m][v];
            if (a->bias)
                sum += load_upto((const Weight*)a->bias + column, n);
            store_upto((Y*)a->y + (row + m) * a->num_outputs + column, sum, n);
        }
    }
}

template <int M, class Weight, class Y>
void product_rows(const ProductArgs* a, int num, int64_t row, int64_t begin, int64_t end) {
    if constexpr (M > 1) {
        if (num < M) {
            product_rows<M - 1, Weight, Y>(a, num, row, begin, end);
            return;
        }
    }
    constexpr int P = PANELS_AT_ONCE<M>;
    int64_t panel = begin;
    for (; panel + P <= end; panel += P)
        product_tile<M, P, Weight, Y>(a, row, panel);
    for (; panel < end; panel++)
        product_tile<M, 1, Weight, Y>(a, row, panel);
}

// Panels begin..end of every row. With more rows than a tile takes, a panel stays in the cache until all rows had it.
template <class Weight, class Y> void product(const ProductArgs* a, int64_t begin, int64_t end) {
    const int64_t num_tiles = (a->num_rows + ROWS_MAX - 1) / ROWS_MAX;
    const int64_t at_once = num_tiles > 1 ? 1 : end - begin;
    for (int64_t panel = begin; panel < end; panel += at_once)
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int64_t row = a->num_rows * tile / num_tiles, next = a->num_rows * (tile + 1) / num_tiles;
            product_rows<ROWS_MAX, Weight, Y>(a, (int)(next - row), row, panel, panel + at_once);
        }
}

void product_any(const ProductArgs* a, int64_t begin, int64_t end) {
    if (a->weight_dtype == FLOAT32)
        product<float, float>(a, begin, end);
    else if (a->y_dtype == FLOAT32)
        product<bf16, float>(a, begin, end);
    else
        product<bf16, bf16>(a, begin, end);
}

// Rows begin..end of x as floats.
void widen_rows(const ProductArgs* a, int64_t begin, int64_t end) {
    const bf16* x = (const bf16*)a->x;
    for (int64_t i = begin * a->num_inputs; i < end * a->num_inputs; i += W) {
        const int64_t left = end * a->num_inputs - i;
        const int n = left < W ? (int)left : W;
        store_upto(a->x_wide + i, load_upto(x + i, n), n);
    }
}

} // namespace
