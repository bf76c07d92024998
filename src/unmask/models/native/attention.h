// Attention of some rows of one sequence to its keys, which lie anywhere in the KV cache; rotary embedding and the per-head norm.
//
// The lanes are (row, head) pairs that share a kv head, so keys and values are read as they lie, softmax needs no horizontal step,
// and a lane's result cannot depend on its neighbours. Keys come in tiles aligned to position 0; a key that a row may not see has
// probability exactly 0, which leaves its sums unchanged.
#pragma once

#include <algorithm>
#include <limits>

#include "vector.h"

constexpr int64_t kKeyTile = 64, kQueryLanes = 48;
// Keys are summed in chunks, and chunks joined in order, whoever computes them: so threads can share one long context.
constexpr int64_t kKeyChunk = 1024;
INLINE int64_t chunks_of(int64_t keys) { return (keys + kKeyChunk - 1) / kKeyChunk; }
// Sums in registers at a time: of some keys, or dimensions of a value, by up to kStrip vectors of lanes.
constexpr int kStrip = 3;
constexpr int outer_rows(int vectors) { return vectors == 1 || kRegisters == 32 ? 8 : 4; }
constexpr int64_t kKeyStep = 8;  // tiles of keys are filled up to a multiple

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

// A softmax of some keys and its sum of values, by lane: the largest score, the sum of exp(score - largest), and [size] sums of
// exp(score - largest) * value.
struct Partial {
    float *peak, *total, *out;

    static int64_t floats(int64_t size) { return (2 + size) * kQueryLanes; }
    explicit Partial(float* from) : peak(from), total(from + kQueryLanes), out(from + 2 * kQueryLanes) {}
};

struct AttentionScratch {
    float *query, *score;  // [size][lanes], [kKeyTile][lanes]
    Partial part, sum;

    static int64_t floats(int64_t size) { return (size + kKeyTile) * kQueryLanes + 2 * Partial::floats(size); }
    AttentionScratch(float* from, int64_t size)
        : query(from), score(from + size * kQueryLanes), part(score + kKeyTile * kQueryLanes), sum(part.peak + Partial::floats(size)) {}
};

// out[i][lane] (+)= sum over j of broadcast(a(i, j)) * b[j][lane], for I values of i and V vectors of lanes.
template <int I, int V, bool kAdd, class A>
INLINE void outer_tile(float* out, const float* b, int64_t count, A a) {
    NativeFloats sums[I][V];
#pragma GCC unroll 8
    for (int i = 0; i < I; i++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) sums[i][v] = kAdd ? load<NativeFloats>(out + i * kQueryLanes + v * kNative) : NativeFloats{};
    for (int64_t j = 0; j < count; j++) {
        NativeFloats row[V];
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) row[v] = load<NativeFloats>(b + j * kQueryLanes + v * kNative);
#pragma GCC unroll 8
        for (int i = 0; i < I; i++) {
            const NativeFloats x = splat_to<NativeFloats>(a(i, j));
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) sums[i][v] = fma(x, row[v], sums[i][v]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < I; i++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) store(out + i * kQueryLanes + v * kNative, sums[i][v]);
}

// The keys or values of a tile, wherever they lie.
struct KeyTile {
    const float* rows[kKeyTile];
    int64_t count;

    void gather(const float* from, const Segment& segment, int64_t first, int64_t last, int64_t size) {
        count = std::max<int64_t>(0, std::min(kKeyTile, last - first));
        for (int64_t k = 0; k < count; k++) rows[k] = from + segment.slots[first + k] * size;
        // So that scores need no tile for the last few; those of the fillings are not used.
        for (int64_t k = count; k % kKeyStep; k++) rows[k] = rows[count - 1];
    }
    // Starts to fetch some rows, so that they arrive while others are used.
    void prefetch(int64_t from, int64_t rows_count, int64_t size) const {
        for (int64_t k = from; k < std::min(from + rows_count, count); k++)
            for (int64_t i = 0; i < size; i += kLanes) __builtin_prefetch(rows[k] + i, 0, 2);
    }
};

// Scores of a tile of keys, and outputs += probabilities x values: the same product, with rows and columns swapped. Of V vectors
// of lanes from `lane` on.
template <int V>
static void score_keys(const AttentionScratch& s, const KeyTile& keys, const KeyTile& upcoming, int64_t lane, int64_t size) {
    constexpr int kTall = outer_rows(V);
    const float* const* rows = keys.rows;
    for (int64_t i = 0; i < keys.count; i += kTall) {
        if (lane == 0) upcoming.prefetch(i, kTall, size);
        outer_tile<kTall, V, false>(s.score + i * kQueryLanes + lane, s.query + lane, size,
                                    [=](int k, int64_t j) { return rows[i + k][j]; });
    }
}

template <int V>
static void add_values(float* out, const float* score, const KeyTile& values, const KeyTile& upcoming, int64_t lane, int64_t size) {
    constexpr int kTall = outer_rows(V);
    const float* const* rows = values.rows;
    out += lane, score += lane;
    int64_t i = 0;
    for (; i + kTall <= size; i += kTall) {
        if (lane == 0) upcoming.prefetch(i, kTall, size);
        outer_tile<kTall, V, true>(out + i * kQueryLanes, score, values.count,
                                   [=](int k, int64_t j) { return rows[j][i + k]; });
    }
    for (; i < size; i++)
        outer_tile<1, V, true>(out + i * kQueryLanes, score, values.count, [=](int, int64_t j) { return rows[j][i]; });
}

// Calls one of the two for all vectors of lanes.
#define UNMASK_STRIPS(function, vectors, ...)                                                                 \
    for (int64_t v = 0; v < vectors; v += kStrip)                                                             \
        (vectors - v >= kStrip ? function<kStrip> : vectors - v == 2 ? function<2> : function<1>)(__VA_ARGS__)

// Turns a tile of scores of one vector of lanes into probabilities relative to the new peak, and rescales what was summed under
// the old one. `visible`: keys that each lane may see.
INLINE void update(const Partial& to, float* score, NativeInts visible, int64_t first_key, int64_t count, int64_t lane, int64_t size) {
    const NativeFloats hidden = splat_to<NativeFloats>(-std::numeric_limits<float>::infinity());
    const NativeFloats before = load<NativeFloats>(to.peak + lane);
    NativeFloats peak = before;
    score += lane;
    for (int64_t k = 0; k < count; k++) {
        const NativeInts key = splat_to<NativeInts>(int32_t(first_key + k));
        const NativeFloats seen = select(key < visible, load<NativeFloats>(score + k * kQueryLanes), hidden);
        store(score + k * kQueryLanes, seen);
        peak = larger(peak, seen);
    }
    const NativeFloats shrink = exp_(before - peak);
    NativeFloats total = load<NativeFloats>(to.total + lane) * shrink;
    for (int64_t k = 0; k < count; k++) {
        const NativeFloats p = exp_(load<NativeFloats>(score + k * kQueryLanes) - peak);
        store(score + k * kQueryLanes, p);
        total += p;
    }
    store(to.peak + lane, peak);
    store(to.total + lane, total);
    float* out = to.out + lane;
    for (int64_t i = 0; i < size; i++) store(out + i * kQueryLanes, load<NativeFloats>(out + i * kQueryLanes) * shrink);
}

// Adds what was summed over later keys.
INLINE void join(const Partial& to, const Partial& part, int64_t vectors, int64_t size) {
    for (int64_t lane = 0; lane < vectors * kNative; lane += kNative) {
        const auto a = load<NativeFloats>(to.peak + lane), b = load<NativeFloats>(part.peak + lane), peak = larger(a, b);
        const NativeFloats mine = exp_(a - peak), its = exp_(b - peak);
        store(to.peak + lane, peak);
        for (int64_t i = lane; i < (1 + size) * kQueryLanes; i += kQueryLanes)  // the total, then the values' sums
            store(to.total + i, load<NativeFloats>(to.total + i) * mine + load<NativeFloats>(part.total + i) * its);
    }
}

// The queries of some lanes of a segment and a kv head.
struct Lanes {
    const Segment& segment;
    const HeadCache& head;
    const Queries& q;
    const AttentionScratch& s;
    const int64_t vectors = (q.to - q.from + kNative - 1) / kNative, last = segment.visible((q.to - 1) / q.heads);

    // The attention of these lanes to all they see.
    void attend() const {
        read_queries();
        for (int64_t chunk = 0; chunk < chunks_of(last); chunk++) {
            attend_chunk(chunk, chunk ? s.part : s.sum);
            if (chunk) join(s.sum, s.part, vectors, q.size);
        }
        write();
    }

    void read_queries() const {
        const float scale = 1.0f / std::sqrt(float(q.size));
        memset(s.query, 0, q.size * kQueryLanes * sizeof(float));
        q.each_lane([&](int64_t lane, int64_t row, int64_t offset) {
            const float* from = q.in + (segment.start + row) * q.in_stride + offset;
            for (int64_t i = 0; i < q.size; i++) s.query[i * kQueryLanes + lane] = from[i] * scale;
        });
    }

    // Attention to the keys of one chunk; a lane that sees none of them has a total of 0.
    void attend_chunk(int64_t chunk, const Partial& to) const {
        int32_t visible[kQueryLanes];
        std::fill_n(visible, kQueryLanes, 1);  // lanes past the last one: only key 0
        q.each_lane([&](int64_t lane, int64_t row, int64_t) { visible[lane] = int32_t(segment.visible(row)); });
        std::fill_n(to.peak, kQueryLanes, -1e30f);  // finite, so that hidden scores lie below it
        memset(to.total, 0, (1 + q.size) * kQueryLanes * sizeof(float));
        const int64_t size = q.size, end = std::min(last, (chunk + 1) * kKeyChunk);
        KeyTile keys, values;
        keys.gather(head.keys, segment, chunk * kKeyChunk, end, size);
        for (int64_t first = chunk * kKeyChunk; first < end; first += kKeyTile) {
            const int64_t count = keys.count;
            values.gather(head.values, segment, first, end, size);
            UNMASK_STRIPS(score_keys, vectors, s, keys, values, v * kNative, size);
            for (int64_t lane = 0; lane < vectors * kNative; lane += kNative)
                update(to, s.score, load<NativeInts>(visible + lane), first, count, lane, size);
            keys.gather(head.keys, segment, first + kKeyTile, end, size);
            UNMASK_STRIPS(add_values, vectors, to.out, s.score, values, keys, v * kNative, size);
        }
    }

    void write() const {
        float inverse[kQueryLanes];
        for (int64_t lane = 0; lane < vectors * kNative; lane += kNative)
            store(inverse + lane, splat_to<NativeFloats>(1.0f) / load<NativeFloats>(s.sum.total + lane));
        q.each_lane([&](int64_t lane, int64_t row, int64_t offset) {
            float* to = q.out + (segment.start + row) * q.out_stride + offset;
            for (int64_t i = 0; i < q.size; i++) to[i] = s.sum.out[i * kQueryLanes + lane] * inverse[lane];
        });
    }
};
#undef UNMASK_STRIPS
