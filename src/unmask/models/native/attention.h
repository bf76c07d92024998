// Attention of some rows of one sequence to its keys, which lie anywhere in the KV cache; rotary embedding and the per-head norm.
//
// Queries are (row, head) pairs that share a kv head. Scores are computed with a query in each lane, what is made of values with a
// dimension in each lane: so both are read as they lie, softmax needs no horizontal step, and no sum depends on other queries. Keys come in tiles aligned to position 0; a key that a row may not see has
// probability exactly 0, which leaves its sums unchanged.
#pragma once

#include <algorithm>
#include <limits>

#include "vector.h"

constexpr int64_t kKeyTile = 64, kQueryLanes = 48;
// Keys are summed in chunks, and chunks joined in order, whoever computes them: so threads can share one long context.
constexpr int64_t kKeyChunk = 256;
INLINE int64_t chunks_of(int64_t keys) { return (keys + kKeyChunk - 1) / kKeyChunk; }

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

// A softmax of some keys and its sum of values, by query: the largest score, the sum of exp(score - largest), and the sums of
// exp(score - largest) * value, [queries][size].
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

// The keys or values of a tile, wherever they lie.
struct KeyTile {
    const float* rows[kKeyTile];
    int64_t count;

    // Rows behind the last one repeat it, so that whole tiles can be computed; nobody looks at their scores.
    void gather(const float* from, const Segment& segment, int64_t first, int64_t last, int64_t size) {
        count = std::max<int64_t>(0, std::min(kKeyTile, last - first));
        for (int64_t k = 0; k < count; k++) rows[k] = from + segment.slots[first + k] * size;
        std::fill(rows + count, rows + kKeyTile, count ? rows[count - 1] : from);
    }
};

// Scores of kTall keys for V vectors of queries. Meanwhile the rows of `upcoming` start to arrive, and the keys' next numbers come from
// the second-level cache.
template <int kTall, int V>
INLINE void score_tile(float* score, const float* query, const float* const* keys, const float* const* upcoming, int64_t size) {
    NativeFloats sums[kTall][V] = {};
    for (int64_t start = 0; start < size; start += kLanes) {
        for (int k = 0; k < kTall; k++) __builtin_prefetch(keys[k] + start + kLanes);
        for (int k = 0; upcoming && k < kTall; k++) __builtin_prefetch(upcoming[k] + start, 0, 2);
        for (int64_t i = start; i < std::min(start + kLanes, size); i++) {
            NativeFloats row[V];
#pragma GCC unroll 3
            for (int v = 0; v < V; v++) row[v] = load<NativeFloats>(query + i * kQueryLanes + v * kNative);
#pragma GCC unroll 8
            for (int k = 0; k < kTall; k++) {
                const NativeFloats x = splat_to<NativeFloats>(keys[k][i]);
#pragma GCC unroll 3
                for (int v = 0; v < V; v++) sums[k][v] = fma(x, row[v], sums[k][v]);
            }
        }
    }
#pragma GCC unroll 8
    for (int k = 0; k < kTall; k++)
#pragma GCC unroll 3
        for (int v = 0; v < V; v++) store(score + k * kQueryLanes + v * kNative, sums[k][v]);
}

template <int V>
static void score_strip(const AttentionScratch& s, const KeyTile& keys, const KeyTile& upcoming, int64_t lane, int64_t size) {
    constexpr int kTall = V == 1 || kRegisters == 32 ? 8 : 4;
    for (int64_t k = 0; k < keys.count; k += kTall)
        score_tile<kTall, V>(s.score + k * kQueryLanes + lane, s.query + lane, keys.rows + k, lane ? nullptr : upcoming.rows + k, size);
}

static void score_keys(const AttentionScratch& s, const KeyTile& keys, const KeyTile& upcoming, int64_t vectors, int64_t size) {
    for (int64_t v = 0; v < vectors; v += 3) {
        const auto strip = vectors - v >= 3 ? score_strip<3> : vectors - v == 2 ? score_strip<2> : score_strip<1>;
        strip(s, keys, upcoming, v * kNative, size);
    }
}

// out[q][i..] += sum over keys of p[key][q] * value[key][i..], for Q queries and V vectors of dimensions.
template <int Q, int V>
INLINE void value_tile(float* out, const float* p, const KeyTile& values, const KeyTile* upcoming, int64_t i, int64_t size) {
    NativeFloats sums[Q][V];
#pragma GCC unroll 3
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[q][v] = load<NativeFloats>(out + q * size + i + v * kNative);
    for (int64_t k = 0; k < values.count; k++) {
        if (upcoming)
            for (int at = 0; at < V * kNative; at += kLanes) __builtin_prefetch(upcoming->rows[k] + i + at, 0, 2);
        NativeFloats x[Q];
#pragma GCC unroll 3
        for (int q = 0; q < Q; q++) x[q] = splat_to<NativeFloats>(p[k * kQueryLanes + q]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            const NativeFloats row = load<NativeFloats>(values.rows[k] + i + v * kNative);
#pragma GCC unroll 3
            for (int q = 0; q < Q; q++) sums[q][v] = fma(x[q], row, sums[q][v]);
        }
    }
#pragma GCC unroll 3
    for (int q = 0; q < Q; q++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(out + q * size + i + v * kNative, sums[q][v]);
}

template <int Q>
static void add_strip(float* out, const float* p, const KeyTile& values, const KeyTile* upcoming, int64_t size) {
    constexpr int kWide = Q == 1 ? 8 : 4;
    int64_t i = 0;
    for (; i + kWide * kNative <= size; i += kWide * kNative) value_tile<Q, kWide>(out, p, values, upcoming, i, size);
    for (; i + kNative <= size; i += kNative) value_tile<Q, 1>(out, p, values, upcoming, i, size);
    for (; i < size; i++)
        for (int q = 0; q < Q; q++)
            for (int64_t k = 0; k < values.count; k++)
                out[q * size + i] = fma_of(p[k * kQueryLanes + q], values.rows[k][i], out[q * size + i]);
}

static void add_values(float* out, const float* p, const KeyTile& values, const KeyTile& upcoming, int64_t queries, int64_t size) {
    for (int64_t q = 0; q < queries; q += 3) {
        const auto strip = queries - q >= 3 ? add_strip<3> : queries - q == 2 ? add_strip<2> : add_strip<1>;
        strip(out + q * size, p + q, values, q ? nullptr : &upcoming, size);
    }
}

// Turns a tile of scores of one vector of queries into probabilities relative to the new peak; what was summed under the old one
// is to be multiplied by `shrink`. `visible`: keys that each query may see.
INLINE NativeFloats update(const Partial& to, float* score, NativeInts visible, int64_t first_key, int64_t count, int64_t lane) {
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
    return shrink;
}

// row = row * factor, unless that changes nothing.
INLINE void scale_row(float* row, float factor, int64_t size) {
    if (factor == 1) return;
    for (int64_t i = 0; i < size; i += kLanes) {
        const int count = lanes_left(i, size);
        store_some(row + i, load_some(row + i, count) * factor, count);
    }
}

// Adds what was summed over later keys.
INLINE void join(const Partial& to, const Partial& part, int64_t queries, int64_t size) {
    for (int64_t q = 0; q < queries; q++) {
        const float peak = std::max(to.peak[q], part.peak[q]);
        const float mine = exp_of(to.peak[q] - peak), its = exp_of(part.peak[q] - peak);
        to.peak[q] = peak;
        to.total[q] = to.total[q] * mine + part.total[q] * its;
        float *row = to.out + q * size, *other = part.out + q * size;
        for (int64_t i = 0; i < size; i += kLanes) {
            const int count = lanes_left(i, size);
            store_some(row + i, load_some(row + i, count) * mine + load_some(other + i, count) * its, count);
        }
    }
}

// Attention of some queries of a segment and a kv head.
struct Lanes {
    const Segment& segment;
    const HeadCache& head;
    const Queries& q;
    const AttentionScratch& s;
    const int64_t count = q.to - q.from, vectors = (count + kNative - 1) / kNative, last = segment.visible((q.to - 1) / q.heads);

    // The attention of these lanes to all they see.
    void attend() const {
        read_queries();
        for (int64_t chunk = 0; chunk < chunks_of(last); chunk++) {
            attend_chunk(chunk, chunk ? s.part : s.sum);
            if (chunk) join(s.sum, s.part, count, q.size);
        }
        write();
    }

    void read_queries() const {
        const float scale = 1.0f / std::sqrt(float(q.size));
        for (int64_t i = 0; i < q.size; i++) memset(s.query + i * kQueryLanes, 0, vectors * kNative * sizeof(float));
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
        memset(to.total, 0, (kQueryLanes + count * q.size) * sizeof(float));
        const int64_t size = q.size, end = std::min(last, (chunk + 1) * kKeyChunk);
        KeyTile keys, values;
        keys.gather(head.keys, segment, chunk * kKeyChunk, end, size);
        for (int64_t first = chunk * kKeyChunk; first < end; first += kKeyTile) {
            const int64_t tile = keys.count;
            values.gather(head.values, segment, first, end, size);
            score_keys(s, keys, values, vectors, size);
            float shrink[kQueryLanes];
            for (int64_t lane = 0; lane < count; lane += kNative)
                store(shrink + lane, update(to, s.score, load<NativeInts>(visible + lane), first, tile, lane));
            for (int64_t lane = 0; lane < count; lane++) scale_row(to.out + lane * size, shrink[lane], size);
            keys.gather(head.keys, segment, first + kKeyTile, end, size);
            add_values(to.out, s.score, values, keys, count, size);
        }
    }

    void write() const {
        q.each_lane([&](int64_t lane, int64_t row, int64_t offset) {
            float* to = q.out + (segment.start + row) * q.out_stride + offset;
            memcpy(to, s.sum.out + lane * q.size, q.size * sizeof(float));
            scale_row(to, 1.0f / s.sum.total[lane], q.size);
        });
    }
};
