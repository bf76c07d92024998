// Sixteen lanes of float or int32, and the few operations the kernels need.
//
// GCC's vector extensions compile to AVX-512, AVX2 or plain code; only the 8-bit dot product and the fused multiply-add are
// spelled out. Define UNMASK_PORTABLE to use no intrinsics at all.
//
// Every result must be the same bits whatever the tile shape, so the build forbids contracting a * b + c behind our back
// (-ffp-contract=off) and each lane sees the same operations in the same order in every variant of a kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#if defined(UNMASK_PORTABLE)
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define UNMASK_VNNI 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define UNMASK_AVX2 1
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef int8_t Bytes __attribute__((vector_size(16)));

template <class V, class T>
INLINE V load(const T* from) {
    V out;
    memcpy(&out, from, sizeof(V));
    return out;
}

template <class V, class T>
INLINE void store(T* to, V value) {
    memcpy(to, &value, sizeof(V));
}

INLINE int lanes_left(int64_t i, int64_t size) { return size - i < kLanes ? int(size - i) : kLanes; }

// The first `count` lanes; the others are zero.
INLINE Floats load_some(const float* from, int count) {
    if (count >= kLanes) return load<Floats>(from);
    Floats out = {};
    memcpy(&out, from, count * sizeof(float));
    return out;
}

INLINE void store_some(float* to, Floats value, int count) {
    if (count >= kLanes) return store(to, value);
    memcpy(to, &value, count * sizeof(float));
}

template <class V, class T>
INLINE V splat_to(T x) {
    return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}
INLINE Floats splat(float x) { return splat_to<Floats>(x); }
INLINE Ints splat(int32_t x) { return splat_to<Ints>(x); }
INLINE Floats to_floats(Ints x) { return __builtin_convertvector(x, Floats); }
INLINE Floats bits_to_floats(Ints x) { return (Floats)x; }
INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
INLINE Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }

// a * b + c with one rounding where the processor has that.
INLINE Floats fma(Floats a, Floats b, Floats c) {
#if defined(UNMASK_VNNI)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(UNMASK_AVX2)
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 2; i++) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    return load<Floats>(z);
#else
    return a * b + c;
#endif
}

// sum[lane] += weights[4 lane .. 4 lane + 3] . the four signed bytes in `four`, exactly.
INLINE Ints dot4(Ints sum, const uint8_t* weights, int32_t four) {
#if defined(UNMASK_VNNI)
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_loadu_si512(weights), _mm512_set1_epi32(four));
#elif defined(UNMASK_AVX2)
    // maddubs saturates at 16 bits: the low seven bits and the top bit of the weights go separately, so that neither can.
    const __m256i a = _mm256_set1_epi32(four), ones = _mm256_set1_epi16(1), top = _mm256_set1_epi8(char(0x80));
    __m256i part[2];
    for (int i = 0; i < 2; i++) {
        const __m256i w = _mm256_loadu_si256((const __m256i*)weights + i);
        const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(top, w), a), ones);
        const __m256i high = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(top, w), a), ones);
        part[i] = _mm256_add_epi32(low, high);
    }
    return sum + load<Ints>(part);
#else
    int8_t a[4];
    memcpy(a, &four, 4);
    for (int lane = 0; lane < kLanes; lane++)
        for (int i = 0; i < 4; i++) sum[lane] += int32_t(weights[4 * lane + i]) * a[i];
    return sum;
#endif
}

// Nearest integer, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves it in the low mantissa bits.
INLINE Ints nearest(Floats x) { return (Ints)(x + 12582912.0f) - 0x4b400000; }

// e^x to about one unit in the last place; exactly 1 at 0 and exactly 0 below -87, so that what a mask hides adds nothing.
INLINE Floats exp_(Floats x) {
    const Floats bounded = larger(x, splat(-87.0f)), capped = bounded < 88.0f ? bounded : splat(88.0f);
    const Ints n = nearest(capped * 1.44269504f);
    const Floats nf = to_floats(n);
    const Floats r = fma(nf, splat(2.12194440e-4f), fma(nf, splat(-0.693359375f), capped));
    Floats p = splat(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f}) p = fma(p, r, splat(c));
    p = fma(p * r, r, r) + 1.0f;
    return x < -87.0f ? Floats{} : p * bits_to_floats((n + 127) << 23);
}

// Horizontal reductions, always in the same order.
INLINE float sum_of(Floats x) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] += x[i + half];
    return x[0];
}

INLINE float max_of(Floats x) {
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    return x[0];
}
