// Tiles of products with float32 and bfloat16 weights; part of gemm.h.
//
// A sum runs over kFloatChunk inputs in order, each product added with one rounding; the sums of the chunks are added to the output
// one after the other. So the order does not depend on the tile, and a chunk of a panel serves many rows from the first-level cache.
#pragma once

#include "linear.h"

constexpr int64_t kFloatChunk = 256;

#if defined(UNMASK_AVX512)
constexpr int kFloatRows = 8, kFloatPanels = 3;
#elif defined(UNMASK_AVX2) || defined(UNMASK_NEON)
constexpr int kFloatRows = 6, kFloatPanels = 1;
#else
constexpr int kFloatRows = 2, kFloatPanels = 1;
#endif

// Weights of some channels at one input, which is `odd` or not.
template <int kBits>
INLINE NativeFloats float_weights(const uint8_t* from, int odd) {
    if (kBits == 32) return load<NativeFloats>(from);
    const NativeInts pairs = load<NativeInts>(from);
    return (NativeFloats)(odd ? pairs & int32_t(0xffff0000) : pairs << 16);
}

template <int kBits>
struct FloatTiles : RegisterTiles {
    static constexpr int kRows = kFloatRows, kPanels = kFloatPanels;
    static constexpr int64_t kDepth = kFloatChunk;
    // Rows that stay in the second-level cache.
    static int64_t row_block(int64_t depth) { return std::max<int64_t>(65536 / depth, 1) * kRows; }

    // R rows by P panels, kept in registers.
    template <int R, int P>
    static void tile(const Tile& t) {
        constexpr int kSums = P * kParts, kInputs = 32 / kBits, kInputBytes = kLanes * kBits / 8;
        const int64_t panel_bytes = t.w.panel_bytes(), stride = t.a.stride;
        const float* x[(R + 2) / 3];  // of every third row: an address can say one or two strides from there
        for (int i = 0; 3 * i < R; i++) x[i] = t.a.x + (t.row + 3 * i) * stride + t.depth.from;
        const uint8_t* weights = t.weights;
        Ahead ahead = t.ahead;
        NativeFloats sums[R][kSums] = {};
        for (int64_t k = t.depth.from; k < t.depth.to; k += kStep, weights += kStep * kInputBytes) {
            ahead.fetch<P, kStep * kInputBytes>(panel_bytes);
#pragma GCC unroll 8
            for (int j = 0; j < kStep; j += kInputs)
#pragma GCC unroll 2
                for (int i = 0; i < kInputs; i++) {
                    NativeFloats w[kSums];
#pragma GCC unroll 8
                    for (int p = 0; p < kSums; p++)
                        w[p] = float_weights<kBits>(
                            weights + p / kParts * panel_bytes + j * kInputBytes + p % kParts * 4 * kNative, i);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const NativeFloats one = splat_to<NativeFloats>(x[r / 3][r % 3 * stride + j + i]);
#pragma GCC unroll 8
                        for (int p = 0; p < kSums; p++) sums[r][p] = fma(one, w[p], sums[r][p]);
                    }
                }
            for (int i = 0; 3 * i < R; i++) x[i] += kStep;
        }
        t.ahead = ahead;
        UNMASK_UNROLL_IN_CLANG
        for (int p = 0; p < P; p++) {
            const int64_t channel = (t.panel + p) * kLanes;
            const int count = lanes_left(channel, t.w.outputs);
            UNMASK_UNROLL_IN_CLANG
            for (int r = 0; r < R; r++) {
                float* out = t.to.out + (t.row + r) * t.to.stride + channel - t.to.first;
                Floats value = load<Floats>(sums[r] + p * kParts);
                if (t.depth.from == 0 && t.w.bias) value += load<Floats>(t.w.bias + channel);
                if (t.depth.from > 0 || t.to.add) value += load_some(out, count);
                store_some(out, value, count);
            }
        }
    }
};
