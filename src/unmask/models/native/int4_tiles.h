// Tiles of products with 4-bit weights, which are expanded in registers; part of gemm.h.
//
// Products of a group's nibbles are summed first, from -8 times the sum of its inputs, then multiplied by the group's integer.
#pragma once

#include "int8_tiles.h"

#if defined(UNMASK_AVX512)
constexpr int kNibbleRows = 4, kNibblePanels = 3;
#elif defined(UNMASK_AVX2) || defined(UNMASK_NEON)
constexpr int kNibbleRows = 4, kNibblePanels = 1;
#else
constexpr int kNibbleRows = 2, kNibblePanels = 1;
#endif

struct Int4Tiles : IntegerTiles {
    static constexpr int kRows = kNibbleRows, kPanels = kNibblePanels;

    template <int R, int P>
    static void tile(const Tile& t) {
        constexpr int kSums = P * kParts;
        const int64_t panel_bytes = t.w.panel_bytes(), groups = t.w.depth / kGroup, stride = t.a.stride;
        const NibbleInput* q = t.a.nibble_q + t.row * stride;
        const int32_t* starts = t.a.nibble_start + t.row * (stride / kGroup);
        const uint8_t *weights = t.weights, *scales = t.w.group_scale + t.panel * groups * kLanes;
        Ahead ahead = t.ahead;
        NativeInts totals[R][kSums] = {};
        for (int64_t group = 0; group < groups; group++, weights += kGroup * kLanes / 2, q += kGroup, scales += kLanes) {
            ahead.fetch(), ahead.fetch();
            NativeInts sums[R][kSums];
            UNMASK_UNROLL_IN_CLANG
            for (int r = 0; r < R; r++)
                UNMASK_UNROLL_IN_CLANG
                for (int p = 0; p < kSums; p++) sums[r][p] = splat_to<NativeInts>(starts[r * (stride / kGroup) + group]);
#pragma GCC unroll 4
            for (int j = 0; j < kGroup; j += 8) {
                NativeInts eight[kSums];
#pragma GCC unroll 8
                for (int p = 0; p < kSums; p++)
                    eight[p] = load<NativeInts>(weights + p / kParts * panel_bytes + j * kLanes / 2 + p % kParts * 4 * kNative);
#pragma GCC unroll 2
                for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
                    for (int pass = 0; pass < kNibblePasses; pass++) {
                        NativeInts four[kSums];
#pragma GCC unroll 8
                        for (int p = 0; p < kSums; p++) four[p] = nibbles_of(eight[p], half, pass);
#pragma GCC unroll 8
                        for (int r = 0; r < R; r++) {
                            const NativeInts x = nibble_inputs_of(q + r * stride + j + 4 * half, pass);
#pragma GCC unroll 8
                            for (int p = 0; p < kSums; p++) sums[r][p] = nibble_dot(sums[r][p], four[p], x);
                        }
                    }
            }
#pragma GCC unroll 8
            for (int p = 0; p < kSums; p++) {
                const NativeInts scale = nibble_scale(scales + p / kParts * groups * kLanes + p % kParts * kNative);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) totals[r][p] += nibble_product(sums[r][p], scale);
            }
        }
        UNMASK_UNROLL_IN_CLANG
        for (int p = 0; p < P; p++) {
            const Finish finish(t.w, t.a, t.to, t.panel + p);
            UNMASK_UNROLL_IN_CLANG
            for (int r = 0; r < R; r++) finish.row(load<Ints>(totals[r] + p * kParts), t.row + r);
        }
    }
};

#if defined(UNMASK_AMX)
// Unpacks one panel to the layout of 8-bit weights.
INLINE void unpack_panel(const Linear& w, int64_t panel, uint8_t* to) {
    typedef uint16_t Shorts __attribute__((vector_size(4 * kNative)));
    const uint8_t* from = w.weight + panel * w.panel_bytes();
    const uint8_t* scales = w.group_scale + panel * (w.depth / kGroup) * kLanes;
    for (int64_t group = 0; group < w.depth / kGroup; group++, scales += kLanes) {
        const NativeInts wide = nibble_scale(scales);
        const Shorts scale = (Shorts)(wide | wide << 16), base = (128 - 8 * scale) * 0x0101;  // no byte overflows
        for (int pair = 0; pair < kGroup / 8; pair++, from += 64, to += 128)
            for (int half = 0; half < 2; half++)
                store(to + half * 64, (Shorts)nibbles_of(load<NativeInts>(from), half, 0) * scale + base);
    }
}
#endif
