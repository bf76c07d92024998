// Matrices, rows and targets: what the products of all kinds of weights share.
//
// Weights lie in panels of 16 channels, by their bits:
//
//    8  [panel][K / 4][channel][4], unsigned bytes w + 128: for some processors the operand of a dot product as it is;
//    4  [panel], and in each first [K / 32][multiple, zero][channel], bytes, then, at a multiple of 64 bytes, codes
//       [K / 8][channel][4], bytes of two inputs, the lower nibble's 4 before the upper one's. A weight is
//       scale * multiple * (code - zero / 16), with a multiple and a zero for every kGroup inputs of a channel;
//   16  [panel][K / 2][channel][2], bfloat16;
//   32  [panel][K][channel], float32.
//
// Bytes are multiplied with activations of 8 bits (signed, scale = max |x| / 127), one scale a row or one scale a group of kGroup
// inputs, and codes with the latter; both have one scale a channel. Sums of integers are exact, over a row or over a group, and the sums of
// groups are added one after the other. Floats are multiplied with float32 activations. A row's result depends neither on the other
// rows nor on how work is cut up nor on the processor.
#pragma once

#include <algorithm>

#include "dot.h"
#include "threads.h"

constexpr int64_t kGroup = 32, kStep = 16;  // depths of integers are multiples of kGroup, those of floats of kStep

// What a product reads of its rows: bits of a set.
enum Form : int { kFloats = 1, kByRow = 2, kByGroup = 4 };

struct Linear {
    const uint8_t* weight;
    const float* scale;  // [padded channels], integers only
    const float* bias;   // [padded channels] or null
    int64_t depth;       // K, padded
    int64_t outputs;     // channels, not padded
    int64_t bits;
    int64_t by_group;  // 0 or 1, of 8 bits: rows have a scale for each group

    bool is_float() const { return bits >= 16; }
    int form() const { return !weight ? 0 : is_float() ? kFloats : bits == 8 && !by_group ? kByRow : kByGroup; }
    int64_t panels() const { return (outputs + kLanes - 1) / kLanes; }
    // Of the multiples and zeros before a panel's codes.
    int64_t head_bytes() const { return bits == 4 ? (depth / kGroup * 2 * kLanes + 63) / 64 * 64 : 0; }
    int64_t panel_bytes() const { return head_bytes() + bytes_of(depth); }
    // Of so many inputs of a panel.
    int64_t bytes_of(int64_t inputs) const { return inputs * kLanes * bits / 8; }

    // One of the matrices, of so many outputs each, padded to panels, that lie one after the other.
    Linear part(int64_t number, int64_t size) const {
        Linear out = *this;
        out.outputs = size;
        const int64_t panel = number * out.panels();
        out.weight += panel * panel_bytes();
        if (scale) out.scale += panel * kLanes;
        return out;
    }
};

// What belongs to a group of a row's inputs.
struct InputGroup {
    float scale;
    float shift;  // what a zero of 1 adds to a product: -1 / 16 of the scaled sum
    int32_t sum;  // of the integers
};

// Rows of activations in the forms that products read, zeros behind each row's end.
struct Rows {
    float* x;  // kFloats

    Input* q;  // kByRow
    float* scale;
    int32_t* sum;

    GroupInput* group_q;  // kByGroup
    InputGroup* groups;   // [rows][stride / kGroup]

    int64_t stride;
};

INLINE float largest_magnitude(const float* x, int64_t size) {
    constexpr int kChains = 4;  // a processor finds as many maxima at a time
    Floats top[kChains] = {};
    int64_t i = 0;
    for (; i + kChains * kLanes <= size; i += kChains * kLanes)
#pragma GCC unroll 4
        for (int chain = 0; chain < kChains; chain++) top[chain] = larger(top[chain], magnitude(load<Floats>(x + i + chain * kLanes)));
    for (; i < size; i += kLanes) top[0] = larger(top[0], magnitude(load_some(x + i, lanes_left(i, size))));
    return max_of(larger(larger(top[0], top[1]), larger(top[2], top[3])));
}

INLINE void quantize_row(const float* x, int64_t size, const Rows& to, int64_t row) {
    const float peak = largest_magnitude(x, size), inverse = peak > 0 ? 127.0f / peak : 0.0f;
    Input* q = to.q + row * to.stride;
    Ints total = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const Ints rounded = nearest(load_some(x + i, lanes_left(i, size)) * inverse);
        store_inputs(q + i, rounded);
        total += rounded;
    }
    const int64_t end = (size + kLanes - 1) / kLanes * kLanes;
    memset(q + end, 0, (to.stride - end) * sizeof(Input));
    to.scale[row] = peak / 127.0f;
    to.sum[row] = sum_of(total);
}

INLINE void quantize_group(Floats first, Floats second, GroupInput* q, InputGroup& group) {
    const float peak = max_of(larger(magnitude(first), magnitude(second)));
    const float inverse = peak > 1e-30f ? 127.0f / peak : 0.0f;  // smaller ones have no inverse, and add nothing
    const Ints low = nearest(first * inverse), high = nearest(second * inverse);
    store_group(q, low, high);
    group.scale = peak / 127.0f;
    group.sum = sum_of(low + high);
    group.shift = group.scale * (float(group.sum) * -0.0625f);
}

// Groups behind the row's end get scales of 0.
INLINE void quantize_groups(const float* x, int64_t size, const Rows& to, int64_t row) {
    const int64_t count = to.stride / kGroup;
    GroupInput* q = to.group_q + row * to.stride;
    InputGroup* groups = to.groups + row * count;
    int64_t group = 0;
    for (; (group + 1) * kGroup <= size; group++, x += kGroup, q += kGroup)
        quantize_group(load<Floats>(x), load<Floats>(x + kLanes), q, groups[group]);
    for (int64_t left = size - group * kGroup; group < count; group++, left = 0, q += kGroup) {
        const int lanes = int(std::min<int64_t>(left, kLanes));
        quantize_group(load_some(x, lanes), load_some(x + lanes, int(left) - lanes), q, groups[group]);
    }
}

// Brings a row of activations into the forms that the next products read.
INLINE void store_row(const float* x, int64_t size, const Rows& to, int64_t row, int forms) {
    if (forms & kByRow) quantize_row(x, size, to, row);
    if (forms & kByGroup) quantize_groups(x, size, to, row);
    if (!(forms & kFloats)) return;
    float* out = to.x + row * to.stride;
    memcpy(out, x, size * sizeof(float));
    memset(out + size, 0, ((size + kStep - 1) / kStep * kStep - size) * sizeof(float));
}

// The same forms of a row, from others of the same stride.
INLINE void copy_row(const Rows& from, int64_t row, const Rows& to, int64_t number, int forms) {
    const int64_t stride = to.stride;
    const auto copy = [=](auto* out, const auto* in, int64_t size) { memcpy(out + number * size, in + row * size, size * sizeof *in); };
    if (forms & kFloats) copy(to.x, from.x, stride);
    if (forms & kByRow) copy(to.q, from.q, stride), copy(to.scale, from.scale, 1), copy(to.sum, from.sum, 1);
    if (forms & kByGroup) copy(to.group_q, from.group_q, stride), copy(to.groups, from.groups, stride / kGroup);
}

// Where a product goes: channel c of row r to out[r * stride + c - first], assigned or added.
struct Target {
    float* out;
    int64_t stride;
    bool add = false;
    int64_t first = 0;
};

// Memory to fetch while tiles of some panels are computed. Of rows that are one tile, which wait for memory: of each panel what is
// read kNear bytes later, and behind its end what the next panels begin with. Nearer than that it would come late, and farther the
// processor's own fetching is in the way. Of rows that are several: the next panels, a part with each tile.
constexpr int64_t kNear = 3072;

struct Ahead {
    const uint8_t* from;        // null: nothing
    const uint8_t *end, *next;  // where it turns to the next panels, and where these begin, or null
    int64_t tiles;

    // For rows of that many tiles, and panels of which the first begins and ends here.
    Ahead(int64_t tiles, const uint8_t* begin, const uint8_t* end, const uint8_t* next)
        : from(begin + kNear), end(end), next(next), tiles(tiles) {
        if (tiles > 1) from = next, this->end = next ? next + (next - begin) : nullptr, this->next = nullptr;
        else turn();
    }

    // While so many bytes of each of P panels are computed on.
    template <int P, int kBytes>
    __attribute__((always_inline)) void fetch(int64_t panel_bytes) {
        if (!from) return;
        if (tiles > 1) {
            for (int64_t line = 0; line < P * kBytes / 64; line += tiles, from += 64) __builtin_prefetch(from, 0, 2);
            return turn();
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; p++)
#pragma GCC unroll 16
            for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(from + p * panel_bytes + line);
        from += kBytes;
        turn();
    }

  private:
    __attribute__((always_inline)) void turn() {
        if (from >= end) from = next, end = reinterpret_cast<const uint8_t*>(UINTPTR_MAX);
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
    Ahead& ahead;  // goes on with the next tile
};

// Unless every loop over sums is unrolled, clang keeps them in memory. GCC does not, and is slower with longer code.
#if defined(__clang__)
#define UNMASK_UNROLL_IN_CLANG _Pragma("unroll")
#else
#define UNMASK_UNROLL_IN_CLANG
#endif

// Of tiles that take no more rows than the registers hold.
struct RegisterTiles {
    static constexpr int64_t kManyRows = 0;
};
