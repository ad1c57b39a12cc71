// The tile instructions of AMX-BF16 in plain C++, as Intel's manual gives them, so that the code around them can be
// tried on any processor: shapes are checked, and every address that is read must lie in memory that was allowed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace emulated {

struct Tile {
    int rows = 0, row_bytes = 0;
    uint8_t bytes[16][64];
};

struct Range {
    const char* begin;
    const char* end;
};

inline Tile tiles[8];
inline Range allowed[2];
inline int num_faults = 0, num_configured = 0, num_released = 0;

inline void expect(bool condition) {
    num_faults += !condition;
}

inline float wide(uint16_t half) {
    const uint32_t bits = (uint32_t)half << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline void configure(const void* config) {
    const uint8_t* bytes = (const uint8_t*)config;
    expect(bytes[0] == 1 && bytes[1] == 0);
    for (int i = 2; i < 16; i++)
        expect(bytes[i] == 0);
    for (int i = 0; i < 16; i++) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        const int rows = bytes[48 + i];
        expect(rows <= 16 && row_bytes <= 64 && (rows == 0) == (row_bytes == 0));
        expect(i < 8 || rows == 0);
        if (i < 8) {
            tiles[i] = Tile{rows, row_bytes, {}};
        }
    }
    num_configured++;
}

inline void load(int tile, const void* from, ptrdiff_t stride) {
    Tile& t = tiles[tile];
    expect(t.rows > 0);
    for (int row = 0; row < t.rows; row++) {
        const char* begin = (const char*)from + row * stride;
        bool known = false;
        for (const Range& range : allowed)
            known |= begin >= range.begin && begin + t.row_bytes <= range.end;
        expect(known);
        if (known)
            std::memcpy(t.bytes[row], begin, (size_t)t.row_bytes);
    }
}

inline void store(int tile, void* to, ptrdiff_t stride) {
    const Tile& t = tiles[tile];
    expect(t.rows > 0);
    for (int row = 0; row < t.rows; row++)
        std::memcpy((char*)to + row * stride, t.bytes[row], (size_t)t.row_bytes);
}

inline void zero(int tile) {
    expect(tiles[tile].rows > 0);
    std::memset(tiles[tile].bytes, 0, sizeof tiles[tile].bytes);
}

// Of each pair the lower and the upper products are summed apart, and both at the end added to the sums.
inline void multiply(int sums, int left, int right) {
    Tile &c = tiles[sums], &a = tiles[left], &b = tiles[right];
    expect(c.rows > 0 && c.rows == a.rows && c.row_bytes == b.row_bytes && b.rows * 4 == a.row_bytes);
    for (int m = 0; m < c.rows; m++)
        for (int n = 0; n < c.row_bytes / 4; n++) {
            float part[2] = {0, 0}, sum;
            for (int k = 0; k < a.row_bytes / 4; k++) {
                uint16_t x[2], w[2];
                std::memcpy(x, a.bytes[m] + 4 * k, 4);
                std::memcpy(w, b.bytes[k] + 4 * n, 4);
                for (int half = 0; half < 2; half++)
                    part[half] += wide(x[half]) * wide(w[half]);
            }
            std::memcpy(&sum, c.bytes[m] + 4 * n, 4);
            sum += part[0] + part[1];
            std::memcpy(c.bytes[m] + 4 * n, &sum, 4);
        }
}

inline void release() {
    for (Tile& tile : tiles)
        tile = Tile{};
    num_released++;
}

} // namespace emulated

#define _tile_loadconfig emulated::configure
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::multiply
#define _tile_release emulated::release
