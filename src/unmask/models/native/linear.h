// Matrices, rows and targets: what the products of all kinds of weights share.
//
// Weights lie in panels of 16 channels, by their bits:
//
//    8  [panel][K / 4][channel][4], unsigned bytes w + 128: for some processors the operand of a dot product as it is;
//    4  [panel][K / 8][channel][4], bytes of two inputs, the lower nibble's 4 before the upper one's. A weight is (q - 8) * s, with
//       a small integer s for every kGroup inputs of a channel, [panel][K / kGroup][channel];
//   16  [panel][K / 2][channel][2], bfloat16;
//   32  [panel][K][channel], float32.
//
// Integers are multiplied with activations of 8 bits, one scale a row (signed, scale = max |x| / 127), and have one scale a channel;
// their sums are exact. Floats are multiplied with float32 activations. A row's result depends neither on the other rows nor on
// how work is cut up nor on the processor.
#pragma once

#include <algorithm>

#include "dot.h"
#include "threads.h"

constexpr int64_t kGroup = 32, kStep = 16;  // depths are multiples of kStep, those of 4 bits of kGroup

struct Linear {
    const uint8_t* weight;
    const uint8_t* group_scale;  // 4-bit weights only
    const float* scale;          // [padded channels], integers only
    const float* bias;           // [padded channels] or null
    int64_t depth;               // K, padded
    int64_t outputs;             // channels, not padded
    int64_t bits;

    bool is_float() const { return bits >= 16; }
    int64_t panels() const { return (outputs + kLanes - 1) / kLanes; }
    int64_t panel_bytes() const { return bytes_of(depth); }
    // Of so many inputs of a panel.
    int64_t bytes_of(int64_t inputs) const { return inputs * kLanes * bits / 8; }
    // One of the matrices, of so many outputs each, padded to panels, that lie one after the other.
    Linear part(int64_t number, int64_t size) const {
        Linear out = *this;
        out.outputs = size;
        const int64_t panel = number * out.panels();
        out.weight += panel * panel_bytes();
        if (group_scale) out.group_scale += panel * (depth / kGroup) * kLanes;
        if (scale) out.scale += panel * kLanes;
        return out;
    }
};

// Rows of activations, zeros behind each row's end: `x` for floats, all else for integers; the last two for 4 bits only.
struct Rows {
    float* x;
    Input* q;
    float* scale;
    int32_t* sum;
    NibbleInput* nibble_q;
    int32_t* nibble_start;  // [rows][stride / kGroup], see `nibble_start_of`
    int64_t stride;
};

INLINE void quantize_row(const float* x, int64_t size, const Rows& to, int64_t row) {
    Floats top = {};
    for (int64_t i = 0; i < size; i += kLanes) top = larger(top, magnitude(load_some(x + i, lanes_left(i, size))));
    const float peak = max_of(top), inverse = peak > 0 ? 127.0f / peak : 0.0f;
    Input* q = to.q + row * to.stride;
    NibbleInput* nibble_q = to.nibble_q + row * to.stride;
    const bool is_copied = to.nibble_start && kCopiesNibbleInputs;
    Ints total = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const Ints rounded = nearest(load_some(x + i, lanes_left(i, size)) * inverse);
        store_inputs(q + i, rounded);
        if (is_copied) store_nibble_inputs(nibble_q + i, rounded);
        total += rounded;
    }
    const int64_t end = (size + kLanes - 1) / kLanes * kLanes;
    memset(q + end, 0, (to.stride - end) * sizeof(Input));
    to.scale[row] = peak / 127.0f;
    to.sum[row] = sum_of(total);
    if (!to.nibble_start) return;
    if (is_copied) memset(nibble_q + end, 0, to.stride - end);
    for (int64_t group = 0; group < to.stride / kGroup; group++)
        to.nibble_start[row * (to.stride / kGroup) + group] = nibble_start_of(nibble_q + group * kGroup, kGroup);
}

// Brings a row of activations into the form that the next product reads.
INLINE void store_row(const float* x, int64_t size, const Rows& to, int64_t row) {
    if (!to.x) return quantize_row(x, size, to, row);
    float* out = to.x + row * to.stride;
    memcpy(out, x, size * sizeof(float));
    memset(out + size, 0, ((size + kStep - 1) / kStep * kStep - size) * sizeof(float));
}

INLINE void copy_row(const Rows& from, int64_t row, const Rows& to, int64_t number) {
    const int64_t stride = to.stride, groups = stride / kGroup;  // both have the same
    if (to.x) {
        memcpy(to.x + number * stride, from.x + row * stride, stride * sizeof(float));
        return;
    }
    memcpy(to.q + number * stride, from.q + row * stride, stride * sizeof(Input));
    to.scale[number] = from.scale[row], to.sum[number] = from.sum[row];
    if (!to.nibble_start) return;
    if (kCopiesNibbleInputs) memcpy(to.nibble_q + number * stride, from.nibble_q + row * stride, stride * sizeof(NibbleInput));
    memcpy(to.nibble_start + number * groups, from.nibble_start + row * groups, groups * sizeof(int32_t));
}

// Where a product goes: channel c of row r to out[r * stride + c - first], assigned or added.
struct Target {
    float* out;
    int64_t stride;
    bool add = false;
    int64_t first = 0;
};

// Memory to fetch while a tile is computed, `lines` cache lines for every `kStep` inputs.
struct Ahead {
    const uint8_t* from;
    int64_t lines;

    void fetch() {
        for (int64_t i = 0; i < lines; i++, from += 64) __builtin_prefetch(from, 0, 2);
    }
};

// What a tile computes: products of rows from `row` on with panels from `panel` on, over the inputs in `depth`.
struct Tile {
    const Linear& w;
    const uint8_t* weights;  // of the first panel, at the first of these inputs
    int64_t panel;
    const Rows& a;
    int64_t row;
    Range depth;
    const Target& to;
    Ahead ahead;
};

// Unless every loop over sums is unrolled, clang keeps them in memory. GCC does not, and is slower with longer code.
#if defined(__clang__)
#define UNMASK_UNROLL_IN_CLANG _Pragma("unroll")
#else
#define UNMASK_UNROLL_IN_CLANG
#endif
