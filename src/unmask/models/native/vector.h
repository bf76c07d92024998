// Sixteen lanes of float or int32, and the few operations the kernels need.
//
// A register holds kNative lanes; `Twice` puts registers together to sixteen. (GCC takes vectors of sixteen lanes on any
// processor, but where no register holds them it keeps them in memory and compares lane by lane.)
//
// Every result must be the same bits whatever the tile shape and the processor, so the build forbids contracting a * b + c behind
// our back (-ffp-contract=off), and each lane sees the same operations in the same order in every variant of a kernel.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <type_traits>

// The instruction set that the build's flags allow, unless a test names one to emulate. UNMASK_PORTABLE: no intrinsics at all.
#if defined(UNMASK_EMULATE)
#include "emulate.h"
#elif defined(UNMASK_PORTABLE)
#elif defined(__x86_64__)
#include <immintrin.h>
#if defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define UNMASK_AVX512 1
#if defined(__AMX_INT8__)
#define UNMASK_AMX 1
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define UNMASK_AVX2 1
#if defined(__AVXVNNI__)
#define UNMASK_AVXVNNI 1
#endif
#else
#define UNMASK_SSE2 1
#endif
#elif defined(__aarch64__)
#include <arm_neon.h>
#define UNMASK_NEON 1
#endif

#define INLINE static inline __attribute__((always_inline))

constexpr int kLanes = 16;
#if defined(UNMASK_AVX512)
constexpr int kNative = 16, kRegisters = 32;
#elif defined(UNMASK_AVX2)
constexpr int kNative = 8, kRegisters = 16;
#elif defined(UNMASK_NEON)
constexpr int kNative = 4, kRegisters = 32;
#else
constexpr int kNative = 4, kRegisters = 16;
#endif
typedef float NativeFloats __attribute__((vector_size(4 * kNative)));
typedef int32_t NativeInts __attribute__((vector_size(4 * kNative)));

template <class V>
struct Twice {
    V lo, hi;
    static constexpr int kHalf = sizeof(V) / 4;
    auto operator[](int lane) const { return lane < kHalf ? lo[lane] : hi[lane - kHalf]; }
};
template <class V, int times>
struct Repeat {
    using type = Twice<typename Repeat<V, times / 2>::type>;
};
template <class V>
struct Repeat<V, 1> {
    using type = V;
};
using Floats = Repeat<NativeFloats, kLanes / kNative>::type;
using Ints = Repeat<NativeInts, kLanes / kNative>::type;

// Operators of two vectors, and of a vector and a number in every lane.
#define UNMASK_OPERATOR(op)                                                                                     \
    template <class V>                                                                                          \
    INLINE auto operator op(Twice<V> a, Twice<V> b)->Twice<decltype(a.lo op b.lo)> {                            \
        return {a.lo op b.lo, a.hi op b.hi};                                                                    \
    }                                                                                                           \
    template <class V, class T, class = std::enable_if_t<std::is_arithmetic_v<T>>>                              \
    INLINE auto operator op(Twice<V> a, T b)->Twice<decltype(a.lo op b)> {                                      \
        return {a.lo op b, a.hi op b};                                                                          \
    }
UNMASK_OPERATOR(+)
UNMASK_OPERATOR(-)
UNMASK_OPERATOR(*)
UNMASK_OPERATOR(/)
UNMASK_OPERATOR(<)
UNMASK_OPERATOR(>)
UNMASK_OPERATOR(<<)
#undef UNMASK_OPERATOR
template <class V>
INLINE Twice<V> operator-(Twice<V> x) {
    return {-x.lo, -x.hi};
}
template <class V, class T>
INLINE Twice<V>& operator+=(Twice<V>& a, T b) {
    return a = a + b;
}

template <class V>
constexpr bool kIsTwice = false;
template <class V>
constexpr bool kIsTwice<Twice<V>> = true;

// Register by register: a copy of them together would go through memory.
template <class V, class T>
INLINE V load(const T* from) {
    if constexpr (kIsTwice<V>) {
        using Half = decltype(V::lo);
        return {load<Half>(from), load<Half>(from + sizeof(Half) / sizeof(T))};
    } else {
        V out;
        memcpy(&out, from, sizeof(V));
        return out;
    }
}

template <class V, class T>
INLINE void store(T* to, V value) {
    if constexpr (kIsTwice<V>)
        store(to, value.lo), store(to + sizeof(value.lo) / sizeof(T), value.hi);
    else
        memcpy(to, &value, sizeof(V));
}

INLINE int lanes_left(int64_t i, int64_t size) { return size - i < kLanes ? int(size - i) : kLanes; }

// The first `count` lanes; the others are zero.
INLINE Floats load_some(const float* from, int count) {
    if (count >= kLanes) return load<Floats>(from);
    float lanes[kLanes] = {};
    memcpy(lanes, from, count * sizeof(float));
    return load<Floats>(lanes);
}

INLINE void store_some(float* to, Floats value, int count) {
    if (count >= kLanes) return store(to, value);
    float lanes[kLanes];
    store(lanes, value);
    memcpy(to, lanes, count * sizeof(float));
}

// A number in every lane of V.
template <class V, class T>
INLINE V splat_to(T x) {
    if constexpr (kIsTwice<V>) {
        const auto half = splat_to<decltype(V::lo)>(x);
        return {half, half};
    } else {
        return x - V{};  // not x + V{}, which would lose the sign of -0
    }
}
INLINE Floats splat(float x) { return splat_to<Floats>(x); }
INLINE Ints splat(int32_t x) { return splat_to<Ints>(x); }

// Lanes of `a` where `mask` is set, of `b` elsewhere.
template <class M, class V>
INLINE V select(M mask, V a, V b) {
    if constexpr (kIsTwice<V>)
        return {select(mask.lo, a.lo, b.lo), select(mask.hi, a.hi, b.hi)};
    else
        return mask ? a : b;
}
template <class V>
INLINE V larger(V a, V b) {
    return select(a > b, a, b);
}
#if defined(UNMASK_AVX512)
INLINE NativeFloats larger(NativeFloats a, NativeFloats b) { return (NativeFloats)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(UNMASK_AVX2)
INLINE NativeFloats larger(NativeFloats a, NativeFloats b) { return (NativeFloats)_mm256_max_ps((__m256)a, (__m256)b); }
#endif
template <class V>
INLINE V smaller(V a, V b) {
    return select(a < b, a, b);
}

INLINE NativeFloats to_floats(NativeInts x) { return __builtin_convertvector(x, NativeFloats); }
INLINE NativeFloats bits_to_floats(NativeInts x) { return (NativeFloats)x; }
INLINE NativeFloats magnitude(NativeFloats x) { return (NativeFloats)((NativeInts)x & 0x7fffffff); }
// Nearest integer, ties to even, of |x| < 2^22: adding 1.5 * 2^23 leaves it in the low mantissa bits.
INLINE NativeInts nearest(NativeFloats x) { return (NativeInts)(x + 12582912.0f) - 0x4b400000; }

// a * b + c with one rounding.
INLINE NativeFloats fma(NativeFloats a, NativeFloats b, NativeFloats c) {
#if defined(UNMASK_AVX512)
    return (NativeFloats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(UNMASK_AVX2)
    return (NativeFloats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(UNMASK_NEON)
    return (NativeFloats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    // In double the product is exact. The sum is rounded to odd, so that rounding it again, to float, errs in no case.
    for (int lane = 0; lane < kNative; lane++) {
        const double product = double(a[lane]) * b[lane], term = c[lane], sum = product + term, part = sum - product;
        const double error = (product - (sum - part)) + (term - part);
        int64_t bits;
        memcpy(&bits, &sum, 8);
        if ((error > 0 || error < 0) && !(bits & 1)) bits += (error > 0) == (sum > 0) ? 1 : -1;
        double odd;
        memcpy(&odd, &bits, 8);
        a[lane] = float(odd);
    }
    return a;
#endif
}

template <class V>
INLINE auto to_floats(Twice<V> x) -> Twice<decltype(to_floats(x.lo))> {
    return {to_floats(x.lo), to_floats(x.hi)};
}
template <class V>
INLINE auto bits_to_floats(Twice<V> x) -> Twice<decltype(bits_to_floats(x.lo))> {
    return {bits_to_floats(x.lo), bits_to_floats(x.hi)};
}
template <class V>
INLINE auto nearest(Twice<V> x) -> Twice<decltype(nearest(x.lo))> {
    return {nearest(x.lo), nearest(x.hi)};
}
template <class V>
INLINE Twice<V> magnitude(Twice<V> x) {
    return {magnitude(x.lo), magnitude(x.hi)};
}
template <class V>
INLINE Twice<V> fma(Twice<V> a, Twice<V> b, Twice<V> c) {
    return {fma(a.lo, b.lo, c.lo), fma(a.hi, b.hi, c.hi)};
}

// e^x to about one unit in the last place; exactly 1 at 0 and exactly 0 below -87, so that what a mask hides adds nothing.
template <class V>
INLINE V exp_(V x) {
    const V lowest = splat_to<V>(-87.0f), capped = smaller(larger(x, lowest), splat_to<V>(88.0f));
    const auto n = nearest(capped * 1.44269504f);
    const V nf = to_floats(n);
    const V r = fma(nf, splat_to<V>(2.12194440e-4f), fma(nf, splat_to<V>(-0.693359375f), capped));
    V p = splat_to<V>(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f}) p = fma(p, r, splat_to<V>(c));
    p = fma(p * r, r, r) + 1.0f;
    return select(x < lowest, V{}, p * bits_to_floats((n + 127) << 23));
}
INLINE float fma_of(float a, float b, float c) {
    return fma(splat_to<NativeFloats>(a), splat_to<NativeFloats>(b), splat_to<NativeFloats>(c))[0];
}
INLINE float exp_of(float x) { return exp_(splat_to<NativeFloats>(x))[0]; }

// Horizontal reductions, always in the same order: lane i with lane i + 8, then i + 4, ...
template <class V, class F>
INLINE auto reduce(V x, F join) {
    if constexpr (kIsTwice<V>) {
        return reduce(join(x.lo, x.hi), join);
    } else if constexpr (sizeof(V) > 16) {
        typedef std::remove_reference_t<decltype(x[0])> Half __attribute__((vector_size(sizeof(V) / 2)));
        Half lo, hi;
        memcpy(&lo, &x, sizeof lo), memcpy(&hi, reinterpret_cast<const char*>(&x) + sizeof lo, sizeof hi);
        return reduce(join(lo, hi), join);
    } else {
        return join(join(x[0], x[2]), join(x[1], x[3]));
    }
}
template <class V>
INLINE auto sum_of(V x) {
    return reduce(x, [](auto a, auto b) { return a + b; });
}
template <class V>
INLINE float max_of(V x) {
    return reduce(x, [](auto a, auto b) {
        if constexpr (std::is_arithmetic_v<decltype(a)>) return a > b ? a : b;
        else return larger(a, b);
    });
}
