// Tiles of products whose inputs have a scale for every group of 32, with weights of 4 bits, which are expanded in registers, and of 8;
// part of gemm.h.
//
// The products of a group's weights and inputs are summed exactly. A sum then becomes a float, of 4-bit weights times the group's
// multiple, and is added, times the scale of the inputs, to the channel's total; after it what the group's zero adds. One order,
// whatever the tile.
#pragma once

#include "int8_tiles.h"

#if defined(UNMASK_AMX)
constexpr int kGroupRows = 4, kGroupPanels = 4;  // many rows are amx.h's
#elif defined(UNMASK_AVX512)
constexpr int kGroupRows = 4, kGroupPanels = 3;
#elif defined(UNMASK_AVX2) || defined(UNMASK_NEON)
constexpr int kGroupRows = 4, kGroupPanels = 1;
#else
constexpr int kGroupRows = 2, kGroupPanels = 1;
#endif

// What weights are at eight inputs, of the channels of one register; and what becomes of sums of a group of them.
template <int kBits>
struct Eight;
template <int kBits>
struct GroupScale;

template <>
struct Eight<4> {
    NativeInts codes;

    explicit Eight(const uint8_t* from) : codes(load<NativeInts>(from)) {}
    __attribute__((always_inline)) NativeInts four(int half, int pass) const { return codes_of(codes, half, pass); }
    static NativeInts dot(NativeInts sum, NativeInts weights, NativeInts inputs) { return code_dot(sum, weights, inputs); }
};

template <>
struct Eight<8> {
    const uint8_t* bytes;

    explicit Eight(const uint8_t* from) : bytes(from) {}
    __attribute__((always_inline)) NativeInts four(int half, int pass) const {
        return group_weights_of(bytes + half * 4 * kLanes, pass);
    }
    static NativeInts dot(NativeInts sum, NativeInts weights, NativeInts inputs) { return byte_dot(sum, weights, inputs); }
};

// The multiples and zeros of a group.
template <>
struct GroupScale<4> {
    Multiples multiple;
    NativeFloats zero;  // times the multiple

    explicit GroupScale(const uint8_t* from) {
        const NativeInts integers = widened(from);
        multiple = multiples_of(integers);
        zero = to_floats(integers * widened(from + kLanes));
    }

    __attribute__((always_inline)) NativeFloats add(NativeFloats total, NativeInts sum, const InputGroup& inputs) const {
        const NativeFloats product = fma(scaled(sum, multiple), splat_to<NativeFloats>(inputs.scale), total);
        return fma(zero, splat_to<NativeFloats>(inputs.shift), product);
    }
};

template <>
struct GroupScale<8> {
    explicit GroupScale(const uint8_t*) {}

    __attribute__((always_inline)) NativeFloats add(NativeFloats total, NativeInts sum, const InputGroup& inputs) const {
        if (kGroupWeightOffset) sum -= splat_to<NativeInts>(kGroupWeightOffset * inputs.sum);
        return fma(to_floats(sum), splat_to<NativeFloats>(inputs.scale), total);
    }
};

template <int kBits>
struct GroupTiles : IntegerTiles {
    static constexpr int kRows = kGroupRows, kPanels = kGroupPanels;

    template <int R, int P>
    static void tile(const Tile& t) {
        constexpr int kSums = P * kParts, kInputBytes = kLanes * kBits / 8;
        const int64_t panel_bytes = t.w.panel_bytes(), groups = t.w.depth / kGroup, stride = t.a.stride, row_groups = stride / kGroup;
        const GroupInput* q = t.a.group_q + t.row * stride;
        const InputGroup* inputs = t.a.groups + t.row * row_groups;
        const uint8_t *scales = t.weights, *weights = t.weights + t.w.head_bytes();
        Ahead ahead = t.ahead;
        NativeFloats totals[R][kSums] = {};
        for (int64_t group = 0; group < groups; group++, weights += kGroup * kInputBytes, q += kGroup, scales += 2 * kLanes) {
            ahead.fetch<P, kGroup * kInputBytes>(panel_bytes);
            NativeInts sums[R][kSums] = {};
#pragma GCC unroll 4
            for (int j = 0; j < kGroup; j += 8) {
                using Weights = Eight<kBits>;
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
                    for (int pass = 0; pass < kGroupPasses; pass++) {
                        NativeInts four[kSums];
#pragma GCC unroll 8
                        for (int p = 0; p < kSums; p++)
                            four[p] = Weights(weights + p / kParts * panel_bytes + j * kInputBytes + p % kParts * 4 * kNative)
                                          .four(half, pass);
#pragma GCC unroll 8
                        for (int r = 0; r < R; r++) {
                            const NativeInts x = group_inputs_of(q + r * stride + j + 4 * half, pass);
#pragma GCC unroll 8
                            for (int p = 0; p < kSums; p++) sums[r][p] = Weights::dot(sums[r][p], four[p], x);
                        }
                    }
            }
#pragma GCC unroll 8
            for (int p = 0; p < kSums; p++) {
                const GroupScale<kBits> scale(scales + p / kParts * panel_bytes + p % kParts * kNative);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) totals[r][p] = scale.add(totals[r][p], sums[r][p], inputs[r * row_groups + group]);
            }
        }
        t.ahead = ahead;
        UNMASK_UNROLL_IN_CLANG
        for (int p = 0; p < P; p++) {
            const Finish finish(t.w, t.to, t.panel + p);
            UNMASK_UNROLL_IN_CLANG
            for (int r = 0; r < R; r++) finish.row(load<Floats>(totals[r] + p * kParts), t.row + r);
        }
    }
};
