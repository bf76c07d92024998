// Tiles of products with 4-bit weights, which are expanded in registers; part of gemm.h.
//
// The products of a group's codes and inputs are summed exactly. A sum then becomes a float, times the group's multiple, and is added,
// times the scale of the inputs, to the channel's total; after it what the group's zero adds. One order, whatever the tile.
#pragma once

#include "int8_tiles.h"

#if defined(UNMASK_AMX)
constexpr int kCodeRows = 4, kCodePanels = 4;  // more rows are amx.h's
#elif defined(UNMASK_AVX512)
constexpr int kCodeRows = 4, kCodePanels = 3;
#elif defined(UNMASK_AVX2) || defined(UNMASK_NEON)
constexpr int kCodeRows = 4, kCodePanels = 1;
#else
constexpr int kCodeRows = 2, kCodePanels = 1;
#endif

// The multiples and zeros of a group, of the channels of one register.
struct GroupScale {
    Multiples multiple;
    NativeFloats zero;  // times the multiple

    explicit GroupScale(const uint8_t* from) {
        const NativeInts integers = widened(from);
        multiple = multiples_of(integers);
        zero = to_floats(integers * widened(from + kLanes));
    }

    __attribute__((always_inline)) NativeFloats add(NativeFloats total, NativeInts sum, float scale, float shift) const {
        const NativeFloats product = fma(scaled(sum, multiple), splat_to<NativeFloats>(scale), total);
        return fma(zero, splat_to<NativeFloats>(shift), product);
    }
};

struct Int4Tiles : IntegerTiles {
    static constexpr int kRows = kCodeRows, kPanels = kCodePanels;
    static constexpr int64_t kFetchStep = kGroup;

    template <int R, int P>
    static void tile(const Tile& t) {
        constexpr int kSums = P * kParts;
        const int64_t panel_bytes = t.w.panel_bytes(), groups = t.w.depth / kGroup, stride = t.a.stride, row_groups = stride / kGroup;
        const GroupInput* q = t.a.group_q + t.row * stride;
        const float *scale = t.a.group_scale + t.row * row_groups, *shift = t.a.group_shift + t.row * row_groups;
        const uint8_t *scales = t.weights, *codes = t.weights + t.w.head_bytes();
        Ahead ahead = t.ahead;
        NativeFloats totals[R][kSums] = {};
        for (int64_t group = 0; group < groups; group++, codes += kGroup * kLanes / 2, q += kGroup, scales += 2 * kLanes) {
            ahead.fetch();
            NativeInts sums[R][kSums] = {};
#pragma GCC unroll 4
            for (int j = 0; j < kGroup; j += 8) {
                NativeInts eight[kSums];
#pragma GCC unroll 8
                for (int p = 0; p < kSums; p++)
                    eight[p] = load<NativeInts>(codes + p / kParts * panel_bytes + j * kLanes / 2 + p % kParts * 4 * kNative);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
                    for (int pass = 0; pass < kCodePasses; pass++) {
                        NativeInts four[kSums];
#pragma GCC unroll 8
                        for (int p = 0; p < kSums; p++) four[p] = codes_of(eight[p], half, pass);
#pragma GCC unroll 8
                        for (int r = 0; r < R; r++) {
                            const NativeInts x = group_inputs_of(q + r * stride + j + 4 * half, pass);
#pragma GCC unroll 8
                            for (int p = 0; p < kSums; p++) sums[r][p] = code_dot(sums[r][p], four[p], x);
                        }
                    }
            }
#pragma GCC unroll 8
            for (int p = 0; p < kSums; p++) {
                const GroupScale group_scale(scales + p / kParts * panel_bytes + p % kParts * kNative);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++)
                    totals[r][p] = group_scale.add(
                        totals[r][p], sums[r][p], scale[r * row_groups + group], shift[r * row_groups + group]);
            }
        }
        UNMASK_UNROLL_IN_CLANG
        for (int p = 0; p < P; p++) {
            const Finish finish(t.w, t.to, t.panel + p);
            UNMASK_UNROLL_IN_CLANG
            for (int r = 0; r < R; r++) finish.row(load<Floats>(totals[r] + p * kParts), t.row + r);
        }
    }
};
