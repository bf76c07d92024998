// Attention of some rows of one sequence to its keys, which lie anywhere in the KV cache; rotary embedding and the per-head norm.
//
// The sixteen lanes are sixteen (row, head) pairs that share a kv head, so keys and values are read as they lie, softmax needs
// no horizontal step, and a lane's result cannot depend on its neighbours. Keys come in tiles aligned to position 0; a key that a
// row may not see has probability exactly 0, which leaves its sums unchanged.
#pragma once

#include <algorithm>
#include <limits>

#include "vector.h"

constexpr int64_t kKeyTile = 64, kQueryVectors = 3, kQueryLanes = kQueryVectors * kLanes;
constexpr int kAttentionTile = 8;  // keys, or dimensions of a value, in registers at a time

// Rows start..stop of a forward are positions past, past + 1, ... of one sequence; its key at position p lies at slots[p].
struct Segment {
    int64_t start, stop, past, block_size;
    int64_t noisy;  // its rows denoise, and gated LoRA applies to them
    const int64_t* slots;

    int64_t num_keys() const { return past + stop - start; }
    // Keys that row `row` of the segment may see.
    int64_t visible(int64_t row) const { return std::min(((past + row) / block_size + 1) * block_size, num_keys()); }
};

// Keys and values of one kv head of one layer: [slot][size].
struct HeadCache {
    const float *keys, *values;
};

// A run of (row, head) lanes of one segment and one kv head, numbered row * heads + head within the segment.
struct Queries {
    const float* in;  // [T][in_stride], at the first head of the group
    float* out;       // [T][out_stride], likewise
    int64_t in_stride, out_stride, heads, size;
    int64_t from, to;

    // Calls f(lane from 0, row within the segment, offset of the head) for every lane.
    template <class F>
    void each_lane(F f) const {
        int64_t row = from / heads, head = from % heads;
        for (int64_t lane = 0; lane < to - from; lane++) {
            f(lane, row, head * size);
            if (++head == heads) head = 0, row++;
        }
    }
};

struct AttentionScratch {
    float *query, *score, *out;  // [size][lanes], [kKeyTile][lanes], [size][lanes]

    static int64_t floats(int64_t size) { return (2 * size + kKeyTile) * kQueryLanes; }
    AttentionScratch(float* from, int64_t size)
        : query(from), score(from + size * kQueryLanes), out(score + kKeyTile * kQueryLanes) {}
};

// out[i][lane] (+)= sum over j of broadcast(a(i, j)) * b[j][lane], for I values of i.
template <int I, int Q, bool kAdd, class A>
INLINE void outer_tile(float* out, const float* b, int64_t count, A a) {
    Floats sums[I][Q];
#pragma GCC unroll 8
    for (int i = 0; i < I; i++)
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) sums[i][q] = kAdd ? load<Floats>(out + i * kQueryLanes + q * kLanes) : Floats{};
    for (int64_t j = 0; j < count; j++) {
        Floats row[Q];
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) row[q] = load<Floats>(b + j * kQueryLanes + q * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < I; i++) {
            const Floats x = splat(a(i, j));
#pragma GCC unroll 3
            for (int q = 0; q < Q; q++) sums[i][q] = fma(x, row[q], sums[i][q]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < I; i++)
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) store(out + i * kQueryLanes + q * kLanes, sums[i][q]);
}

// The keys or values of a tile, wherever they lie.
struct KeyTile {
    const float* rows[kKeyTile];
    int64_t count;

    void gather(const float* from, const Segment& segment, int64_t first, int64_t last, int64_t size) {
        count = std::max<int64_t>(0, std::min(kKeyTile, last - first));
        for (int64_t k = 0; k < count; k++) rows[k] = from + segment.slots[first + k] * size;
    }
    // Starts to fetch some rows, so that they arrive while others are used.
    void prefetch(int64_t from, int64_t size) const {
        for (int64_t k = from; k < std::min(from + kAttentionTile, count); k++)
            for (int64_t i = 0; i < size; i += kLanes) __builtin_prefetch(rows[k] + i, 0, 2);
    }
};

// Scores of a tile of keys, and outputs += probabilities x values: the same product, with rows and columns swapped.
template <int Q>
static void score_keys(const AttentionScratch& s, const KeyTile& keys, const KeyTile& upcoming, int64_t size) {
    const float* const* rows = keys.rows;
    int64_t i = 0;
    for (; i + kAttentionTile <= keys.count; i += kAttentionTile) {
        upcoming.prefetch(i, size);
        outer_tile<kAttentionTile, Q, false>(s.score + i * kQueryLanes, s.query, size, [=](int k, int64_t j) { return rows[i + k][j]; });
    }
    for (; i < keys.count; i++)
        outer_tile<1, Q, false>(s.score + i * kQueryLanes, s.query, size, [=](int, int64_t j) { return rows[i][j]; });
}

template <int Q>
static void add_values(const AttentionScratch& s, const KeyTile& values, const KeyTile& upcoming, int64_t size) {
    const float* const* rows = values.rows;
    int64_t i = 0;
    for (; i + kAttentionTile <= size; i += kAttentionTile) {
        upcoming.prefetch(i, size);
        outer_tile<kAttentionTile, Q, true>(s.out + i * kQueryLanes, s.score, values.count, [=](int k, int64_t j) { return rows[j][i + k]; });
    }
    for (; i < size; i++)
        outer_tile<1, Q, true>(s.out + i * kQueryLanes, s.score, values.count, [=](int, int64_t j) { return rows[j][i]; });
}

// Running softmax of one vector of lanes.
struct Softmax {
    Floats peak = splat(-std::numeric_limits<float>::infinity()), total = {};
    Ints visible = {};  // keys that each lane may see
};

// Turns a tile of scores into probabilities relative to the new peak, and rescales what was summed under the old one.
INLINE void update(Softmax& state, float* score, float* out, int64_t first_key, int64_t count, int64_t size) {
    Floats peak = state.peak;
    for (int64_t k = 0; k < count; k++) {
        const Floats x = load<Floats>(score + k * kQueryLanes);
        const Floats seen = splat(int32_t(first_key + k)) < state.visible ? x : splat(-std::numeric_limits<float>::infinity());
        store(score + k * kQueryLanes, seen);
        peak = larger(peak, seen);
    }
    const Floats shrink = exp_(state.peak - peak);
    state.peak = peak;
    state.total *= shrink;
    for (int64_t k = 0; k < count; k++) {
        const Floats p = exp_(load<Floats>(score + k * kQueryLanes) - peak);
        store(score + k * kQueryLanes, p);
        state.total += p;
    }
    for (int64_t i = 0; i < size; i++) store(out + i * kQueryLanes, load<Floats>(out + i * kQueryLanes) * shrink);
}

template <int Q>
static void attend(const Segment& segment, const HeadCache& head, const Queries& q, const AttentionScratch& s) {
    const int64_t size = q.size;
    const float scale = 1.0f / std::sqrt(float(size));
    Softmax state[Q];
    memset(s.query, 0, size * kQueryLanes * sizeof(float));
    memset(s.out, 0, size * kQueryLanes * sizeof(float));
    q.each_lane([&](int64_t lane, int64_t row, int64_t offset) {
        const float* from = q.in + (segment.start + row) * q.in_stride + offset;
        for (int64_t i = 0; i < size; i++) s.query[i * kQueryLanes + lane] = from[i] * scale;
        state[lane / kLanes].visible[lane % kLanes] = int32_t(segment.visible(row));
    });
    // Lanes past the last one see nothing but key 0: a softmax of one number.
    for (int64_t lane = q.to - q.from; lane < Q * kLanes; lane++) state[lane / kLanes].visible[lane % kLanes] = 1;
    const int64_t last = segment.visible((q.to - 1) / q.heads);
    KeyTile keys, values;
    keys.gather(head.keys, segment, 0, last, size);
    for (int64_t first = 0; first < last; first += kKeyTile) {
        const int64_t count = keys.count;
        values.gather(head.values, segment, first, last, size);
        score_keys<Q>(s, keys, values, size);
        for (int v = 0; v < Q; v++) update(state[v], s.score + v * kLanes, s.out + v * kLanes, first, count, size);
        keys.gather(head.keys, segment, first + kKeyTile, last, size);
        add_values<Q>(s, values, keys, size);
    }
    q.each_lane([&](int64_t lane, int64_t row, int64_t offset) {
        const float inverse = 1.0f / state[lane / kLanes].total[lane % kLanes];
        float* to = q.out + (segment.start + row) * q.out_stride + offset;
        for (int64_t i = 0; i < size; i++) to[i] = s.out[i * kQueryLanes + lane] * inverse;
    });
}

static void attend(const Segment& segment, const HeadCache& head, const Queries& q, const AttentionScratch& s) {
    const int64_t vectors = (q.to - q.from + kLanes - 1) / kLanes;
    (vectors == 1 ? attend<1> : vectors == 2 ? attend<2> : attend<3>)(segment, head, q, s);
}
