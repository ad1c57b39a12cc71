// Scores of a tile: keys are turned so that a vector holds one channel (or pair of channels) of W keys, and every score is
// one chain of multiply-adds over the channels, from the first to the last. Two ways of one chain: with few queries while
// the keys are being turned, with many from a scratch that holds them turned.
//
// What a tile's keys are read for is asked for in the next tile at the same place and moment: asked for all at once, the
// processor's few places for lines on their way would stand in each other's way, and it would wait.
#pragma once
#include "tiles.h"

namespace {

// Vectors side by side for R queries: enough chains to keep the multiply-adders busy, few enough for the registers.
template <int R> constexpr int KEY_VECTORS = R <= 2 && TILE / W >= 4 ? 4 : 2;

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

// Keys [TILE rows of size, each at `at`] -> links [.., TILE], through words of 32 bits: one float, or two bfloat16. All
// that a register block of scores may touch is written.
template <bool WHOLE, class T, class Word>
inline void turn_square(const T* const* rows, const T* const* ahead, int64_t at, int word, int num, Word* key) {
    constexpr int EACH = 4 / sizeof(T), WORDS = LINE / 4;
    const bool first_of_line = W >= WORDS || word % WORDS == 0;
    vf v[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) {
        const float* from = (const float*)(const void*)(rows[i] + at) + word;
        v[i] = WHOLE ? load(from) : load_upto(from, num);
        if (first_of_line)
            __builtin_prefetch((const float*)(const void*)(ahead[i] + at) + word, 0, 2);
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

template <class T, class Word>
void turn_keys(const T* const* rows, const T* const* ahead, int64_t at, int low, int n, int size, Word* key) {
    constexpr int KEYS = KEY_VECTORS<1> * W;
    const int num_words = size * (int)sizeof(T) / 4, end = (n + KEYS - 1) / KEYS * KEYS;
    for (int first = low / KEYS * KEYS; first < end; first += W) {
        int word = 0;
        for (; word + W <= num_words; word += W)
            turn_square<true>(rows + first, ahead + first, at, word, W, key + first);
        if (word < num_words)
            turn_square<false>(rows + first, ahead + first, at, word, num_words - word, key + first);
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

#if W == 16

// The same of so few queries that their sums stay in registers beside the keys. (Unmasked, the compiler's header warns of
// itself.)
constexpr int FEW = 4;  // queries
constexpr int WORDS_AT_ONCE = 8;

// Lanes of 4 numbers: in each, a[i] holds words of a key; then a[i] holds word i of four keys.
__attribute__((always_inline)) inline void turn_fours(__m512* a) {
    const __m512 low = _mm512_maskz_unpacklo_ps(0xffff, a[0], a[1]), low_2 = _mm512_maskz_unpacklo_ps(0xffff, a[2], a[3]);
    const __m512 high = _mm512_maskz_unpackhi_ps(0xffff, a[0], a[1]), high_2 = _mm512_maskz_unpackhi_ps(0xffff, a[2], a[3]);
    const auto join = [](__m512 one, __m512 other, bool upper) {
        const __m512d x = (__m512d)one, y = (__m512d)other;
        return (__m512)(upper ? _mm512_maskz_unpackhi_pd(0xff, x, y) : _mm512_maskz_unpacklo_pd(0xff, x, y));
    };
    a[0] = join(low, low_2, false);
    a[1] = join(low, low_2, true);
    a[2] = join(high, high_2, false);
    a[3] = join(high, high_2, true);
}

// Words word..word+8, or the `num` that are left, of W keys: v[i] becomes word i of every key. Keys are put where the last
// step, which takes two lanes of each, leaves them in their order.
template <bool WHOLE, class T>
__attribute__((always_inline)) inline void turned_words(const T* const* rows, const T* const* ahead, int64_t at, int word,
                                                        int num, vf* v) {
    const bool first_of_line = word * 4 % LINE == 0;
    const auto half = [&](int i) {
        const float* from = (const float*)(const void*)(rows[i] + at) + word;
        if (first_of_line)
            __builtin_prefetch((const float*)(const void*)(ahead[i] + at) + word, 0, 2);
        return WHOLE ? _mm256_loadu_ps(from) : _mm256_maskz_loadu_ps((__mmask8)((1u << num) - 1), from);
    };
    __m512 a[4], b[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(half(i)), half(4 + i), 1);
        b[i] = _mm512_maskz_insertf32x8(0xffff, _mm512_castps256_ps512(half(8 + i)), half(12 + i), 1);
    }
    turn_fours(a);
    turn_fours(b);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        v[i] = (vf)_mm512_maskz_shuffle_f32x4(0xffff, a[i], b[i], 0x88);
        v[4 + i] = (vf)_mm512_maskz_shuffle_f32x4(0xffff, a[i], b[i], 0xdd);
    }
}

template <bool WHOLE, int R, class T, class Word>
__attribute__((always_inline)) inline void score_words(const T* const* rows, const T* const* ahead, int64_t at, int word, int num,
                                                       const Word* query, int64_t stride, vf (*sums)[R]) {
    constexpr int EACH = 4 / sizeof(T), V = TILE / W;
    typedef Link<T> L;
    vf v[V][WORDS_AT_ONCE];
#pragma GCC unroll 2
    for (int i = 0; i < V; i++)
        turned_words<WHOLE>(rows + i * W, ahead + i * W, at, word, num, v[i]);
    query += word * (EACH / L::EACH);
#pragma GCC unroll 8
    for (int w = 0; w < WORDS_AT_ONCE; w++) {
        if (!WHOLE && w >= num)
            break;
        __asm__ volatile("" ::: "memory");  // or the compiler takes all queries' words first, and has no registers for them
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Word* q = query + r * stride + w * (EACH / L::EACH);
#pragma GCC unroll 2
            for (int i = 0; i < V; i++) {
                if constexpr (EACH == L::EACH) {
                    sums[i][r] = L::add(sums[i][r], spread(*q), (typename L::Vector)v[i][w]);
                } else {
                    sums[i][r] = L::add(sums[i][r], spread(q[0]), (vf)((vu)v[i][w] << 16));
                    sums[i][r] = L::add(sums[i][r], spread(q[1]), (vf)((vu)v[i][w] & 0xffff0000u));
                }
            }
        }
    }
}

template <class T, int R = FEW, class Word>
void score_few(int count, const T* const* rows, const T* const* ahead, int64_t at, const Word* query, int64_t stride, int size,
               float* scores) {
    if constexpr (R > 1) {
        if (count < R) {
            score_few<T, R - 1>(count, rows, ahead, at, query, stride, size, scores);
            return;
        }
    }
    constexpr int V = TILE / W;
    const int num_words = size * (int)sizeof(T) / 4;
    vf sums[V][R] = {};
    int word = 0;
    for (; word + WORDS_AT_ONCE <= num_words; word += WORDS_AT_ONCE)
        score_words<true, R>(rows, ahead, at, word, WORDS_AT_ONCE, query, stride, sums);
    if (word < num_words)
        score_words<false, R>(rows, ahead, at, word, num_words - word, query, stride, sums);
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
            store(scores + r * TILE + v * W, sums[v][r]);
}

#else

constexpr int FEW = 0;  // the registers hold no more than the keys

template <class T, class Word>
void score_few(int, const T* const*, const T* const*, int64_t, const Word*, int64_t, int, float*) {}

#endif

} // namespace
