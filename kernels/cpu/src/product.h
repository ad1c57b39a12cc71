// Matrix products y = x W^T (+ bias) with packed weights. Every output element is one chain over the inputs, from the
// first to the last, one multiply-add each (or, with bfloat16 units, one for each pair of inputs); bias and rounding
// come once, at the end. Rows and columns of a register tile are separate chains, so a row's bits cannot depend on how
// many rows there are, or on who computes which columns.
//
// The weights lie in panels of PANEL columns, steps of inputs outside, columns inside (kernels/cpu/product.py packs
// them). What a step is, each Kind below says.
#pragma once
#include "gated.h"
#include "ops.h"
#include "vec.h"
#if defined(__AMX_BF16__)
#include "product_amx.h"
#endif

namespace {

constexpr int PANEL = 2 * W;
constexpr int ROWS_MAX = W == 16 ? 12 : 6;  // rows of a tile: their sums, a step's weights and an input fit the registers

// One row is bound by memory alone and takes several panels at once, because one panel's few chains would wait for
// themselves. From two rows on the panels come one after the other, so that what is fetched ahead is the next panel.
template <int M> constexpr int PANELS_AT_ONCE = M == 1 ? 4 : 1;
template <int M> constexpr int AHEAD = M == 1 ? 512 : 6144;  // bytes; measured on Zen 4

// A step is one input. Float32 weights: the panel's columns one after the other.
struct Floats {
    typedef float Weight, Input, Word;
    typedef vf Columns;
    static constexpr int64_t STEP = 2 * W, INPUTS = 1;

    static void load(const Word* p, Columns* columns) {
        columns[0] = ::load(p);
        columns[1] = ::load(p + W);
    }
    static vf spread(const Input* x) { return splat(*x); }
    static vf add(vf sum, vf input, vf column) { return fma(input, column, sum); }
};

#if defined(__AVX512BF16__)

// A step is two inputs: W words of a pair each for the first half of the columns, then for the second; the lower input
// is the lower half of the word. The instruction adds the two exact products to the sum in one order for every lane; it
// reads numbers below 2^-126 as zeros.
struct Halves {
    typedef bf16 Weight;
    typedef uint32_t Input, Word;
    typedef vu Columns;
    static constexpr int64_t STEP = 2 * W, INPUTS = 2;

    static bool ready(const ProductArgs* a) { return a->num_inputs % 2 == 0; }
    // An odd last input is followed by a zero.
    static void make_ready(const uint16_t* x, Input* to, int64_t num) {
        for (int64_t i = 0; i < num; i += 2)
            to[i / 2] = x[i] | (i + 1 < num ? (uint32_t)x[i + 1] << 16 : 0);
    }

    static void load(const Word* p, Columns* columns) {
        __builtin_memcpy(columns, p, sizeof(vu));
        __builtin_memcpy(columns + 1, p + W, sizeof(vu));
    }
    static vu spread(const Input* x) { return *x - vu{}; }
    static vf add(vf sum, vu input, vu column) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)input, (__m512bh)column);
    }
};

#else

// A step is one input, as a float. A word holds column i in its low half and column W + i in its high half, so that a
// shift and a mask make two vectors of floats.
struct Halves {
    typedef bf16 Weight;
    typedef float Input;
    typedef uint32_t Word;
    typedef vf Columns;
    static constexpr int64_t STEP = W, INPUTS = 1;

    static bool ready(const ProductArgs*) { return false; }
    static void make_ready(const uint16_t* x, Input* to, int64_t num) {
        for (int64_t i = 0; i < num; i += W) {
            const int n = num - i < W ? (int)(num - i) : W;
            store_upto(to + i, load_upto((const bf16*)x + i, n), n);
        }
    }

    static void load(const Word* p, Columns* columns) {
        vu words;
        __builtin_memcpy(&words, p, sizeof words);
        columns[0] = (vf)(words << 16);
        columns[1] = (vf)(words & 0xffff0000u);
    }
    static vf spread(const Input* x) { return splat(*x); }
    static vf add(vf sum, vf input, vf column) { return fma(input, column, sum); }
};

#endif

template <class Kind> int64_t steps_of(const ProductArgs* a) {
    return (a->num_inputs + Kind::INPUTS - 1) / Kind::INPUTS;
}

// Rows row..row+M times panels panel..panel+P.
template <int M, int P, class Kind, class Y> void product_tile(const ProductArgs* a, int64_t row, int64_t panel) {
    typedef typename Kind::Columns Columns;
    typedef typename Kind::Word Word;
    const int64_t num_steps = steps_of<Kind>(a), panel_words = num_steps * Kind::STEP;
    const auto* x = (const typename Kind::Input*)a->x_ready + row * num_steps;
    const Word* weight = (const Word*)a->weight + panel * panel_words;
    vf sums[M][2 * P];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int v = 0; v < 2 * P; v++)
            sums[m][v] = vf{};
    for (int64_t k = 0; k < num_steps; k++) {
        Columns columns[2 * P];
#pragma GCC unroll 16
        for (int p = 0; p < P; p++) {
            const Word* step = weight + p * panel_words + k * Kind::STEP;
#pragma GCC unroll 2
            for (int64_t line = 0; line < Kind::STEP * (int64_t)sizeof(Word); line += 64)
                __builtin_prefetch((const char*)step + AHEAD<M> + line);
            Kind::load(step, columns + 2 * p);
        }
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            const Columns input = Kind::spread(x + m * num_steps + k);
#pragma GCC unroll 16
            for (int v = 0; v < 2 * P; v++)
                sums[m][v] = Kind::add(sums[m][v], input, columns[v]);
        }
    }
    if (a->gated) {
        float together[M][2 * P * W];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++)
#pragma GCC unroll 16
            for (int v = 0; v < 2 * P; v++)
                store(together[m] + v * W, sums[m][v]);
        for (int p = 0; p < P; p++)
            gate<typename Kind::Weight>(a, together[0] + 2 * p * W, together[0] + (2 * p + 1) * W, 2 * P * W, row, M,
                                        (panel + p) * W, W);
        return;
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
                sum += load_upto((const typename Kind::Weight*)a->bias + column, n);
            store_upto((Y*)a->y + (row + m) * a->num_outputs + column, sum, n);
        }
    }
}

template <int M, class Kind, class Y>
void product_rows(const ProductArgs* a, int num, int64_t row, int64_t begin, int64_t end) {
    if constexpr (M > 1) {
        if (num < M) {
            product_rows<M - 1, Kind, Y>(a, num, row, begin, end);
            return;
        }
    }
    constexpr int P = PANELS_AT_ONCE<M>;
    int64_t panel = begin;
    for (; panel + P <= end; panel += P)
        product_tile<M, P, Kind, Y>(a, row, panel);
    for (; panel < end; panel++)
        product_tile<M, 1, Kind, Y>(a, row, panel);
}

// Panels begin..end of every row. With more rows than a tile takes, a panel stays in the cache until all rows had it.
template <class Kind, class Y> void product(const ProductArgs* a, int64_t begin, int64_t end) {
    const int64_t num_tiles = (a->num_rows + ROWS_MAX - 1) / ROWS_MAX;
    const int64_t at_once = num_tiles > 1 ? 1 : end - begin;
    for (int64_t panel = begin; panel < end; panel += at_once)
        for (int64_t tile = 0; tile < num_tiles; tile++) {
            const int64_t row = a->num_rows * tile / num_tiles, next = a->num_rows * (tile + 1) / num_tiles;
            product_rows<ROWS_MAX, Kind, Y>(a, (int)(next - row), row, panel, panel + at_once);
        }
}

// bfloat16 weights, without tiles.
namespace vectors {

constexpr int64_t INPUTS = Halves::INPUTS;

template <class Y> void product(const ProductArgs* a, int64_t begin, int64_t end) {
    ::product<Halves, Y>(a, begin, end);
}

inline int64_t ready_bytes(const ProductArgs* a) {
    return Halves::ready(a) ? 0 : a->num_rows * steps_of<Halves>(a) * (int64_t)sizeof(Halves::Input);
}

inline void make_ready(const ProductArgs* a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
        Halves::make_ready((const uint16_t*)a->x + row * a->num_inputs,
                           (Halves::Input*)a->x_ready + row * steps_of<Halves>(a), a->num_inputs);
}

} // namespace vectors

#if defined(__AMX_BF16__)
namespace bf16_weights = amx;
static_assert(PANEL == amx::PANEL, "one width of panels for all weights");
#else
namespace bf16_weights = vectors;
#endif

// Bytes that the inputs of all rows take in the form that the tiles read; 0: as they lie.
int64_t ready_bytes(const ProductArgs* a) {
    return a->weight_dtype == FLOAT32 ? 0 : bf16_weights::ready_bytes(a);
}

void product_any(const ProductArgs* a, int64_t begin, int64_t end) {
    if (a->weight_dtype == FLOAT32)
        product<Floats, float>(a, begin, end);
    else if (a->y_dtype == FLOAT32)
        bf16_weights::product<float>(a, begin, end);
    else
        bf16_weights::product<bf16>(a, begin, end);
}

} // namespace
