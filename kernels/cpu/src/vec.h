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
#elif defined(__aarch64__)
#include <arm_neon.h>
#define W 4
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

// a * b + c, rounded once where the instruction set has it. Never left to the compiler, which may fuse here and not there:
// the library is built with -ffp-contract=off.
inline vf fma(vf a, vf b, vf c) {
#if W == 16
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif W == 8
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
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
#if W == 16  // what the compiler would take several instructions for; unmasked, its header warns of itself
    return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h) << 16);
#elif W == 8
    return (vf)((vu)_mm256_cvtepu16_epi32((__m128i)h) << 16);
#else
    return (vf)(__builtin_convertvector(h, vu) << 16);
#endif
}

inline void store(float* p, vf v) {
    __builtin_memcpy(p, &v, sizeof v);
}

// Round to nearest even, as torch does; a NaN stays a NaN. (The instruction makes zeros of numbers below 2^-126.)
inline void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
    const __m256bh narrow = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &narrow, sizeof narrow);
#else
    vu u = (vu)v;
    vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    vu quiet = (u >> 16) | 0x40u;
    vh h = __builtin_convertvector((v != v) ? quiet : rounded, vh);
    __builtin_memcpy(p, &h, sizeof h);
#endif
}

// The first n lanes, 0 < n < W; the others are zero and are neither read nor written in memory.
template <class T> inline vf load_part(const T* p, int n) {
    T lanes[W];
    __builtin_memset(lanes, 0, sizeof lanes);
    __builtin_memcpy(lanes, p, sizeof(T) * (size_t)n);
    return load(lanes);
}

#if W == 16  // instead of a call of memcpy, and a wait for its bytes

inline vf load_part(const float* p, int n) {
    return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}

inline vf load_part(const bf16* p, int n) {
    const __m256i h = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return (vf)((vu)_mm512_maskz_cvtepu16_epi32(0xffff, h) << 16);
}

#endif

template <class T> inline void store_part(T* p, vf v, int n) {
    T lanes[W];
    store(lanes, v);
    __builtin_memcpy(p, lanes, sizeof(T) * (size_t)n);
}

#if W == 16

inline void store_part(float* p, vf v, int n) {
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}

#endif

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

template <int... I> struct Lanes {};
template <int N, int... I> struct Count : Count<N - 1, N - 1, I...> {};
template <int... I> struct Count<0, I...> {
    typedef Lanes<I...> type;
};

template <int STEP, int... I> inline vf swapped(vf v, Lanes<I...>) {
    return __builtin_shufflevector(v, v, (I ^ STEP)...);
}

// A fixed tree over the lanes: the upper half of what is left onto the lower.
template <int STEP = W / 2> inline float sum_lanes(vf v) {
    if constexpr (STEP == 0)
        return v[0];
    else
        return sum_lanes<STEP / 2>(v + swapped<STEP>(v, typename Count<W>::type()));
}

template <int STEP = W / 2> inline float max_lanes(vf v) {
    if constexpr (STEP == 0) {
        return v[0];
    } else {
        const vf other = swapped<STEP>(v, typename Count<W>::type());
        return max_lanes<STEP / 2>(v > other ? v : other);
    }
}

template <int... I> inline vi numbered(Lanes<I...>) {
    return vi{I...};
}

inline vi lane_numbers() {
    return numbered(typename Count<W>::type());
}

// In a transposition's step, lane i of the vector that keeps its lower (upper) lanes comes from: W and above, the other.
template <int STEP> constexpr int kept(int lane, bool upper) {
    return lane & STEP ? W + lane - (upper ? 0 : STEP) : lane + (upper ? STEP : 0);
}

template <int STEP, int... I> inline void exchange(vf& a, vf& b, Lanes<I...>) {
    const vf lower = __builtin_shufflevector(a, b, kept<STEP>(I, false)...);
    b = __builtin_shufflevector(a, b, kept<STEP>(I, true)...);
    a = lower;
}

// W vectors as a square: lane j of v[i] and lane i of v[j] change places. In registers, so never a call.
template <int STEP = W / 2> __attribute__((always_inline)) inline void transpose(vf* v) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
        if (!(i & STEP))
            exchange<STEP>(v[i], v[i + STEP], typename Count<W>::type());
    if constexpr (STEP > 1)
        transpose<STEP / 2>(v);
}

// Cephes' expf, for numbers within -87.3 and 88.3 (with AVX-512: -200 and 200) and NaN: within 2 units in the last place.
inline vf exp_within(vf x) {
    const vf magic = splat(12582912.f);
    const vf n = fma(x, splat(1.44269504088896341f), magic) - magic;
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1.0f;
#if W == 16
    return (vf)_mm512_maskz_scalef_ps(0xffff, (__m512)p, (__m512)n);  // p * 2^n, also where that is 0, infinity or NaN
#else
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return x != x ? x : p * (vf)power;
#endif
}

#if W == 16

// Of a NaN and a number these instructions give the second.
inline vf not_below(float low, vf x) {
    return (vf)_mm512_maskz_max_ps(0xffff, (__m512)splat(low), (__m512)x);
}

inline vf not_above(float high, vf x) {
    return (vf)_mm512_maskz_min_ps(0xffff, (__m512)splat(high), (__m512)x);
}

// 0 from -104 on down, infinity from 88.8 on, NaN for NaN.
inline vf exp(vf x) {
    return exp_within(not_above(200.0f, not_below(-200.0f, x)));
}

// The same for numbers that are not positive.
inline vf exp_negative(vf x) {
    return exp_within(not_below(-200.0f, x));
}

#else

// Exactly 0 below -87.3, infinity above 88.3, NaN for NaN.
inline vf exp(vf x0) {
    const vf low = splat(-87.3f), high = splat(88.3f);
    vf x = x0 < low ? low : x0;
    x = x > high ? high : x;
    const vf result = x0 < low ? vf{} : exp_within(x);
    return x0 > high ? splat(__builtin_inff()) : result;
}

// The same for numbers that are not positive.
inline vf exp_negative(vf x0) {
    const vf low = splat(-87.3f);
    return x0 < low ? vf{} : exp_within(x0 < low ? low : x0);
}

#endif

// Cephes' tanhf: a polynomial near zero, so that small numbers keep their digits; NaN for NaN.
inline vf tanh(vf x) {
    const vf z = x * x, size = x < vf{} ? -x : x;
    vf p = splat(-5.70498872745e-3f);
    p = fma(p, z, splat(2.06390887954e-2f));
    p = fma(p, z, splat(-5.37397155531e-2f));
    p = fma(p, z, splat(1.33314422036e-1f));
    p = fma(p, z, splat(-3.33332819422e-1f));
    const vf near = fma(p * z, x, x), far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
    return size < 0.625f ? near : x < vf{} ? -far : far;
}

// erfc of numbers that are not negative: exp(-x^2) times a polynomial in 1 / (1 + x / 2) under the exponential, fitted by
// Chebyshev (Numerical Recipes, 6.2.2): within 1.2e-7 of itself before rounding; NaN for NaN.
inline vf erfc_positive(vf x) {
    const vf t = 1.0f / (1.0f + 0.5f * x);
    vf p = splat(0.17087277f);
    p = fma(p, t, splat(-0.82215223f));
    p = fma(p, t, splat(1.48851587f));
    p = fma(p, t, splat(-1.13520398f));
    p = fma(p, t, splat(0.27886807f));
    p = fma(p, t, splat(-0.18628806f));
    p = fma(p, t, splat(0.09678418f));
    p = fma(p, t, splat(0.37409196f));
    p = fma(p, t, splat(1.00002368f));
    p = fma(p, t, splat(-1.26551223f));
    return t * exp(fma(-x, x, p));
}

} // namespace
