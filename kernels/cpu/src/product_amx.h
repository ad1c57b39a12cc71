// Matrix products of bfloat16 on AMX tiles. A tile instruction adds 16 rows x 32 inputs times 32 inputs x 16 columns to
// 16 x 16 sums. Every sum is one chain over blocks of 32 inputs, from the first to the last, and depends on its own row
// and column alone; a tile of fewer rows is configured as such, so that nothing is read beyond the last row. The weights
// lie as in product.h with steps of pairs, filled with zeros to whole blocks.
//
// Whoever includes this has the tile intrinsics: the compiler's, or tests/kernels/emulated_tiles.h.
#pragma once
#include "gated.h"
#include "ops.h"
#include "vec.h"

namespace {
namespace amx {

constexpr int ROWS = 16, COLUMNS = 16, INPUTS = 32;  // of a tile
constexpr int PANEL = 2 * COLUMNS;
constexpr int64_t BLOCK_BYTES = INPUTS * 2 * PANEL;  // a panel's weights for one block of inputs
constexpr int64_t AHEAD = 6144;                      // bytes of weights asked for before they are needed

struct Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0..3 are sums, lower rows first; 4 and 5 inputs of the lower and upper rows; 6 and 7 weights, left and right.
inline void configure(int lower, int upper) {
    alignas(64) Config config;
    const int rows[8] = {lower, lower, upper, upper, lower, upper, INPUTS / 2, INPUTS / 2};
    for (int tile = 0; tile < 8; tile++) {
        config.rows[tile] = (uint8_t)rows[tile];
        config.row_bytes[tile] = rows[tile] ? 64 : 0;
    }
    _tile_loadconfig(&config);
}

inline int64_t blocks_of(const ProductArgs* a) {
    return (a->num_inputs + INPUTS - 1) / INPUTS;
}

// `num` rows of sums from memory to y.
template <class Y> void finish(const ProductArgs* a, const float* sums, int64_t row, int num, int64_t first_column) {
    for (int i = 0; i < COLUMNS; i += W) {
        const int64_t column = first_column + i, left = a->num_outputs - column;
        if (left <= 0)
            break;
        const int n = left < W ? (int)left : W;
        for (int m = 0; m < num; m++) {
            vf sum = load(sums + m * COLUMNS + i);
            if (a->bias)
                sum += load_upto((const bf16*)a->bias + column, n);
            store_upto((Y*)a->y + (row + m) * a->num_outputs + column, sum, n);
        }
    }
}

// Rows row..row+lower+upper of one panel; the tiles are configured for them. UPPER: whether there are upper ones.
template <bool UPPER, class Y> void tiles(const ProductArgs* a, int64_t row, int lower, int upper, int64_t panel) {
    const int64_t num_blocks = blocks_of(a), stride = num_blocks * INPUTS * 2;
    const char* x = (const char*)a->x_ready + row * stride;
    const char* weight = (const char*)a->weight + panel * num_blocks * BLOCK_BYTES;
    _tile_zero(0);
    _tile_zero(1);
    if (UPPER) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t block = 0; block < num_blocks; block++, x += 64, weight += BLOCK_BYTES) {
        if (row == 0)
            for (int64_t line = 0; line < BLOCK_BYTES; line += 64)
                __builtin_prefetch(weight + AHEAD + line);
        _tile_loadd(6, weight, PANEL * 4);
        _tile_loadd(7, weight + COLUMNS * 4, PANEL * 4);
        _tile_loadd(4, x, stride);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (UPPER) {
            _tile_loadd(5, x + ROWS * stride, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    alignas(64) float sums[4][ROWS * COLUMNS];
    _tile_stored(0, sums[0], COLUMNS * 4);
    _tile_stored(1, sums[1], COLUMNS * 4);
    if (!a->gated) {
        finish<Y>(a, sums[0], row, lower, panel * PANEL);
        finish<Y>(a, sums[1], row, lower, panel * PANEL + COLUMNS);
    } else
        gate<bf16>(a, sums[0], sums[1], COLUMNS, row, lower, panel * COLUMNS, COLUMNS);
    if (UPPER) {
        _tile_stored(2, sums[2], COLUMNS * 4);
        _tile_stored(3, sums[3], COLUMNS * 4);
        if (!a->gated) {
            finish<Y>(a, sums[2], row + ROWS, upper, panel * PANEL);
            finish<Y>(a, sums[3], row + ROWS, upper, panel * PANEL + COLUMNS);
        } else
            gate<bf16>(a, sums[2], sums[3], COLUMNS, row + ROWS, upper, panel * COLUMNS, COLUMNS);
    }
}

// Panels begin..end of every row.
template <class Y> void product(const ProductArgs* a, int64_t begin, int64_t end) {
    int configured = 0;  // rows
    for (int64_t panel = begin; panel < end; panel++)
        for (int64_t row = 0; row < a->num_rows; row += 2 * ROWS) {
            const int64_t left = a->num_rows - row;
            const int num = left < 2 * ROWS ? (int)left : 2 * ROWS;
            const int lower = num < ROWS ? num : ROWS, upper = num - lower;
            if (configured != num)
                configure(lower, upper);
            configured = num;
            if (upper)
                tiles<true, Y>(a, row, lower, upper, panel);
            else
                tiles<false, Y>(a, row, lower, upper, panel);
        }
    _tile_release();  // so that the system has nothing to save for this thread
}

inline int64_t ready_bytes(const ProductArgs* a) {
    return a->num_inputs % INPUTS == 0 ? 0 : a->num_rows * blocks_of(a) * INPUTS * 2;
}

// Rows begin..end of x, filled with zeros to whole blocks.
inline void make_ready(const ProductArgs* a, int64_t begin, int64_t end) {
    const size_t row_bytes = (size_t)blocks_of(a) * INPUTS * 2, num_bytes = (size_t)a->num_inputs * 2;
    for (int64_t row = begin; row < end; row++) {
        char* to = (char*)a->x_ready + (size_t)row * row_bytes;
        __builtin_memcpy(to, (const char*)a->x + (size_t)row * num_bytes, num_bytes);
        __builtin_memset(to + num_bytes, 0, row_bytes - num_bytes);
    }
}

} // namespace amx
} // namespace
