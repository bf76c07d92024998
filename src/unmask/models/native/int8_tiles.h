// Tiles of products with 8-bit weights; part of gemm.h.
#pragma once

#include "linear.h"

// Turns sums of one panel, in units of the channels' scales, into outputs.
struct Finish {
    const Target& to;
    int64_t channel;
    int count;
    Floats scale, bias;

    Finish(const Linear& w, const Target& target, int64_t panel)
        : to(target), channel(panel * kLanes), count(lanes_left(channel, w.outputs)), scale(load<Floats>(w.scale + channel)),
          bias(w.bias ? load<Floats>(w.bias + channel) : Floats{}) {}

    __attribute__((always_inline)) void row(Floats sum, int64_t row) const {
        float* out = to.out + row * to.stride + channel - to.first;
        Floats value = sum * scale + bias;
        if (to.add) value += load_some(out, count);
        store_some(out, value, count);
    }
};

// What tiles of integers share: sums over the whole depth, and rows that stay in the second-level cache.
struct IntegerTiles : RegisterTiles {
    static constexpr int64_t kDepth = INT64_MAX;
    static int64_t row_block(int64_t) { return 256; }
};

struct Int8Tiles : IntegerTiles {
    static constexpr int kRows = kTileRows, kPanels = kTilePanels;

    // R rows by P panels, kept in registers.
    template <int R, int P>
    static void tile(const Tile& t) {
        constexpr int kSums = P * kParts;
        const int64_t panel_bytes = t.w.depth * kLanes, stride = t.a.stride;
        const Input* q[(R + 2) / 3];  // of every third row: an address can say one or two strides from there
        for (int i = 0; 3 * i < R; i++) q[i] = t.a.q + (t.row + 3 * i) * stride;
        const uint8_t* weights = t.weights;
        Ahead ahead = t.ahead;
        NativeInts sums[R][kSums];
        UNMASK_UNROLL_IN_CLANG
        for (int r = 0; r < R; r++)
            UNMASK_UNROLL_IN_CLANG
            for (int p = 0; p < kSums; p++) sums[r][p] = splat_to<NativeInts>(-kWeightOffset * t.a.sum[t.row + r]);
        for (int64_t k = 0; k < t.w.depth; k += kStep, weights += kStep * kLanes) {
            ahead.fetch<P, kStep * kLanes>(panel_bytes);
#pragma GCC unroll 4
            for (int j = 0; j < kStep; j += 4)
#pragma GCC unroll 2
                for (int pass = 0; pass < kPasses; pass++) {
                    NativeInts four[kSums];
#pragma GCC unroll 8
                    for (int p = 0; p < kSums; p++)
                        four[p] = weights_of(weights + p / kParts * panel_bytes + j * kLanes + p % kParts * 4 * kNative, pass);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        const NativeInts x = inputs_of(q[r / 3] + r % 3 * stride + j, pass);
#pragma GCC unroll 8
                        for (int p = 0; p < kSums; p++) sums[r][p] = dot(sums[r][p], four[p], x);
                    }
                }
            for (int i = 0; 3 * i < R; i++) q[i] += kStep;
        }
        t.ahead = ahead;
        UNMASK_UNROLL_IN_CLANG
        for (int p = 0; p < P; p++) {
            const Finish finish(t.w, t.to, t.panel + p);
            UNMASK_UNROLL_IN_CLANG
            for (int r = 0; r < R; r++) finish.row(to_floats(load<Ints>(sums[r] + p * kParts)) * t.a.scale[t.row + r], t.row + r);
        }
    }
};
