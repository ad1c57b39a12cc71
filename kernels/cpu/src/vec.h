// Vectors of W floats through the compiler's own vector types: one source for every instruction set, chosen by the
// flags of the translation unit. Nothing here may have external linkage: the same source is compiled several times.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define W 16
#elif defined(__AVX2__)
#include <immintrin.h>
#define W 8
#else
#define W 4
#endif

namespace {

struct bf16 {
    uint16_t bits;
};

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

inline vf splat(float x) {
    return x - vf{};  // keeps the sign of a zero, so that it is a broadcast and no addition
}

// a * b + c, rounded once where the instruction set has it. Not left to the compiler, which may fuse here and not there.
inline vf fma(vf a, vf b, vf c) {
#if W == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif W == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline vf load(const float* p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

inline vf load(const bf16* p) {
    vh h;
    __builtin_memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

inline void store(float* p, vf v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Round to nearest even, as torch does; a NaN stays a NaN.
inline void store(bf16* p, vf v) {
    vu u = (vu)v;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu quiet = (u >> 16) | 0x40u;
    vh h = __builtin_convertvector((v != v) ? quiet : rounded, vh);
    __builtin_memcpy(p, &h, sizeof h);
}

// The first n lanes, 0 < n < W; the others are zero and are neither read nor written in memory.
template <class T> inline vf load_part(const T* p, int n) {
    T lanes[W];
    __builtin_memset(lanes, 0, sizeof lanes);
    __builtin_memcpy(lanes, p, sizeof(T) * (size_t)n);
    return load(lanes);
}

template <class T> inline void store_part(T* p, vf v, int n) {
    T lanes[W];
    store(lanes, v);
    __builtin_memcpy(p, lanes, sizeof(T) * (size_t)n);
}

inline int upto(int64_t left) {
    return left < W ? (int)left : W;
}

template <class T> inline vf load_upto(const T* p, int n) {
    return n >= W ? load(p) : load_part(p, n);
}

template <class T> inline void store_upto(T* p, vf v, int n) {
    if (n >= W)
        store(p, v);
    else
        store_part(p, v, n);
}

// A fixed tree over the lanes.
inline float sum_lanes(vf v) {
    float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

inline float max_lanes(vf v) {
    float lanes[W];
    store(lanes, v);
    for (int half = W / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}

// Cephes' expf: within 2 units in the last place; exactly 0 below -87.3, infinity above 88.3, NaN for NaN.
inline vf exp(vf x0) {
    const vf low = splat(-87.3f), high = splat(88.3f), magic = splat(12582912.f);
    vf x = x0 < low ? low : x0;
    x = x > high ? high : x;
    vf n = (x * 1.44269504088896341f + magic) - magic;
    vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    vf result = p * (vf)power;
    result = x0 < low ? vf{} : result;
    result = x0 > high ? splat(__builtin_inff()) : result;
    return x0 != x0 ? x0 : result;
}

// Cephes' tanhf: a polynomial near zero, so that small numbers keep their digits; NaN for NaN.
inline vf tanh(vf x) {
    const vf z = x * x, size = x < vf{} ? -x : x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const vf near = p * z * x + x, far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return size < 0.625f ? near : x < vf{} ? -far : far;
}

template <int... I> struct Lanes {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> {
    typedef Lanes<I...> type;
};

// Segments of S lanes in a and b: the two halves of each are added; segment g of a ends in g * S, of b in g * S + S / 2.
constexpr int halves(int S, int lane, int upper) {
    const int segment = lane / S, within = lane % S, from_b = within >= S / 2;
    return (from_b ? W : 0) + segment * S + within % (S / 2) + (upper ? S / 2 : 0);
}

template <int S, int... I> inline vf fold(vf a, vf b, Lanes<I...>) {
    return __builtin_shufflevector(a, b, halves(S, I, 0)...) + __builtin_shufflevector(a, b, halves(S, I, 1)...);
}

// W vectors -> one vector whose lane i is the sum of the lanes of v[i], each in the same fixed tree.
template <int S> inline vf sum_each(const vf* v) {
    if constexpr (S == 1) {
        return v[0];
    } else {
        vf folded[S / 2];
        for (int i = 0; i < S / 2; i++)
            folded[i] = fold<S>(v[i], v[i + S / 2], typename Count<W>::type());
        return sum_each<S / 2>(folded);
    }
}

} // namespace
