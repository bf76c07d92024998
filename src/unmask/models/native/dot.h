// Products of four inputs and sixteen channels: what the tiles of a matrix product are made of, by instruction set.
//
// Sums of a panel lie in kParts registers. `weights_of` reads one register's channels, `inputs_of` four inputs of a row into every
// lane, `dot` adds their products, exactly. Without an instruction for bytes they are widened to 16 bits, and four inputs take two
// passes: 0 and 2, then 1 and 3; rows are stored in that order, see `store_inputs`.
#pragma once

#include "vector.h"

#if defined(UNMASK_AVX512) || defined(UNMASK_AVXVNNI)
typedef int8_t Input;
constexpr int kPasses = 1;
#elif defined(UNMASK_AVX2) || defined(UNMASK_SSE2)
typedef int16_t Input;
constexpr int kPasses = 2;
#else
typedef int8_t Input;
constexpr int kPasses = 1;
#endif

// Rows and panels of a tile, of more than kWideRows rows kTallPanels: as many sums as fit the registers beside the weights, an input and
// a product. Many rows may be amx.h's.
#if defined(UNMASK_AVX512)
constexpr int kTileRows = 8, kTilePanels = 4, kWideRows = 6, kTallPanels = 3;
#elif defined(UNMASK_AVX2) || defined(UNMASK_NEON)
constexpr int kTileRows = 6, kTilePanels = 1, kWideRows = kTileRows, kTallPanels = kTilePanels;
#else
constexpr int kTileRows = 2, kTilePanels = 1, kWideRows = kTileRows, kTallPanels = kTilePanels;
#endif

constexpr int kParts = kLanes / kNative;

// Weights are multiplied as w + kWeightOffset; the offset's part of a sum is taken off at its start.
#if defined(UNMASK_NEON) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int32_t kWeightOffset = 0;
#else
constexpr int32_t kWeightOffset = 128;
#endif

INLINE NativeInts weights_of(const uint8_t* from, int pass) {
    const NativeInts bytes = load<NativeInts>(from);
    if (kWeightOffset == 0) return bytes ^ int32_t(0x80808080);
    if (kPasses == 1) return bytes;
    typedef uint16_t Shorts __attribute__((vector_size(4 * kNative)));
    return pass == 0 ? bytes & 0x00ff00ff : (NativeInts)((Shorts)bytes >> 8);
}

INLINE NativeInts inputs_of(const Input* from, int pass) { return splat_to<NativeInts>(load<int32_t>(from + 2 * pass)); }

// Keeps the compiler from adding up products of many steps first, for which there are no registers.
#define UNMASK_ADDED(sum) asm("" : "+x"(sum))

INLINE NativeInts dot(NativeInts sum, NativeInts weights, NativeInts inputs) {
#if defined(UNMASK_AVX512)
    return (NativeInts)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, (__m512i)inputs);
#elif defined(UNMASK_AVXVNNI)
    return (NativeInts)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)weights, (__m256i)inputs);
#elif defined(UNMASK_AVX2)
    sum += (NativeInts)_mm256_madd_epi16((__m256i)weights, (__m256i)inputs);
    UNMASK_ADDED(sum);
    return sum;
#elif defined(UNMASK_SSE2)
    sum += (NativeInts)_mm_madd_epi16((__m128i)weights, (__m128i)inputs);
    UNMASK_ADDED(sum);
    return sum;
#elif defined(UNMASK_NEON) && defined(__ARM_FEATURE_MATMUL_INT8)
    return (NativeInts)vusdotq_s32((int32x4_t)sum, (uint8x16_t)weights, (int8x16_t)inputs);
#elif defined(UNMASK_NEON) && defined(__ARM_FEATURE_DOTPROD)
    return (NativeInts)vdotq_s32((int32x4_t)sum, (int8x16_t)weights, (int8x16_t)inputs);
#elif defined(UNMASK_NEON)
    // Two products of signed bytes fit into 16 bits, as no input is -128.
    const int8x16_t w = (int8x16_t)weights, x = (int8x16_t)inputs;
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return (NativeInts)vpadalq_s16((int32x4_t)sum, vpaddq_s16(low, high));
#else
    for (int lane = 0; lane < kNative; lane++)
        for (int i = 0; i < 32; i += 8) sum[lane] += (weights[lane] >> i & 255) * int8_t(inputs[lane] >> i);
    return sum;
#endif
}

// Stores integers of a quantised row as `inputs_of` reads them.
INLINE void store_inputs(Input* to, NativeInts x) {
    typedef Input Narrow __attribute__((vector_size(kNative * sizeof(Input))));
#if defined(UNMASK_AVX2) && !defined(UNMASK_AVXVNNI)
    x = (NativeInts)_mm256_shuffle_epi32((__m256i)x, _MM_SHUFFLE(3, 1, 2, 0));
#elif defined(UNMASK_SSE2)
    x = (NativeInts)_mm_shuffle_epi32((__m128i)x, _MM_SHUFFLE(3, 1, 2, 0));
#endif
    typedef int16_t Shorts __attribute__((vector_size(kNative * 2)));  // GCC narrows by halves only
    store(to, __builtin_convertvector(__builtin_convertvector(x, Shorts), Narrow));
}
template <class V>
INLINE void store_inputs(Input* to, Twice<V> x) {
    store_inputs(to, x.lo);
    store_inputs(to + sizeof(V) / 4, x.hi);
}

// The same for groups of 32 inputs of 8 bits in their order; first with the codes of 4-bit weights, 0..15. A register's lane holds
// eight codes of a channel: four in the lower nibbles (half 0), four in the upper ones. Sums of a group fit into 16 bits.
#if defined(UNMASK_AVX2) && !defined(UNMASK_AVXVNNI)
#define UNMASK_CODE_PAIRS 1  // a lane's sums are two of 16 bits: of the first two of each four inputs, and of the others
typedef int8_t GroupInput;
constexpr int kGroupPasses = 1;
typedef NativeInts Multiples;
#else
typedef Input GroupInput;
constexpr int kGroupPasses = kPasses;
typedef NativeFloats Multiples;
#endif

INLINE NativeInts codes_of(NativeInts eight, int half, int pass) {
    const NativeInts bytes = (half ? eight >> 4 : eight) & 0x0f0f0f0f;
    if (kGroupPasses == 1) return bytes;
    return pass == 0 ? bytes & 0x00ff00ff : bytes >> 8 & 0x00ff00ff;
}

INLINE NativeInts group_inputs_of(const GroupInput* from, int pass) { return splat_to<NativeInts>(load<int32_t>(from + 2 * pass)); }

INLINE NativeInts code_dot(NativeInts sum, NativeInts codes, NativeInts inputs) {
#if defined(UNMASK_CODE_PAIRS)
    sum = (NativeInts)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)codes, (__m256i)inputs));
    UNMASK_ADDED(sum);
    return sum;
#else
    return dot(sum, codes, inputs);
#endif
}

// Then with the bytes of 8-bit weights, which are multiplied as w + kGroupWeightOffset.
#if defined(UNMASK_CODE_PAIRS)
constexpr int32_t kGroupWeightOffset = 0;
#else
constexpr int32_t kGroupWeightOffset = kWeightOffset;
#endif

INLINE NativeInts group_weights_of(const uint8_t* from, int pass) {
#if defined(UNMASK_CODE_PAIRS)
    return load<NativeInts>(from) ^ int32_t(0x80808080);
#else
    return weights_of(from, pass);
#endif
}

INLINE NativeInts byte_dot(NativeInts sum, NativeInts weights, NativeInts inputs) {
#if defined(UNMASK_CODE_PAIRS)
    // Two products fit into 16 bits, as no input is -128; signs go with the inputs.
    const __m256i w = (__m256i)weights, pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8((__m256i)inputs, w));
    sum += (NativeInts)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    UNMASK_ADDED(sum);
    return sum;
#else
    return dot(sum, weights, inputs);
#endif
}

// A byte for each of kNative channels.
INLINE NativeInts widened(const uint8_t* from) {
#if defined(UNMASK_AVX512)
    return (NativeInts)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(UNMASK_AVX2)
    return (NativeInts)_mm256_cvtepu8_epi32(_mm_loadu_si64(from));
#elif defined(UNMASK_SSE2)
    const __m128i zero = _mm_setzero_si128(), bytes = _mm_cvtsi32_si128(load<int32_t>(from));
    return (NativeInts)_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero);
#elif defined(UNMASK_NEON)
    return (NativeInts)vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(load<uint32_t>(from)))));
#else
    typedef uint8_t Narrow __attribute__((vector_size(kNative)));
    return __builtin_convertvector(load<Narrow>(from), NativeInts);
#endif
}

// A group's multiples as `scaled` takes them.
INLINE Multiples multiples_of(NativeInts multiple) {
#if defined(UNMASK_CODE_PAIRS)
    return multiple | multiple << 16;
#else
    return to_floats(multiple);
#endif
}

// A group's sums times its multiples: exact, as the products have 24 bits.
INLINE NativeFloats scaled(NativeInts sum, Multiples multiple) {
#if defined(UNMASK_CODE_PAIRS)
    return to_floats((NativeInts)_mm256_madd_epi16((__m256i)sum, (__m256i)multiple));
#else
    return to_floats(sum) * multiple;
#endif
}

// Stores the integers of a group as `group_inputs_of` reads them.
INLINE void store_group(GroupInput* to, Ints first, Ints second) {
#if defined(UNMASK_AVX2)
    const __m256i low = _mm256_packs_epi32((__m256i)first.lo, (__m256i)first.hi);
    const __m256i high = _mm256_packs_epi32((__m256i)second.lo, (__m256i)second.hi);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packing keeps halves apart
    store(to, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order));
#else
    store_inputs(to, first);
    store_inputs(to + kLanes, second);
#endif
}
