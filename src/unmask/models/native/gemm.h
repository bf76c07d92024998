// Matrix products with 8-bit activations and 8- or 4-bit weights.
//
// Activations are quantised per row (signed, scale = max |x| / 127), weights per output channel. Sums are exact 32-bit integers,
// so a row's result depends neither on the other rows nor on how work is cut up nor on the processor.
//
// Weights lie in panels of 16 channels, [panel][K / 4][channel][4], as unsigned bytes w + 128: for some processors the operand of
// a dot product as it is. 4-bit weights are (q - 8) * s with a small integer s per 32 inputs of a channel: their panels are
// [K / 32][4][channel][8 nibbles], unpacked to bytes before use.
#pragma once

#include <algorithm>
#include <utility>

#include "dot.h"
#include "threads.h"

constexpr int64_t kGroup = 32, kStep = 16;  // depths are multiples of kStep

struct Linear {
    const uint8_t* weight;
    const uint8_t* group_scale;  // [panel][K / 32][channel], 4-bit weights only
    const float* scale;          // [padded channels]
    const float* bias;           // [padded channels] or null
    int64_t depth;               // K, padded
    int64_t outputs;             // channels, not padded
    int64_t bits;

    int64_t panels() const { return (outputs + kLanes - 1) / kLanes; }
    int64_t panel_bytes() const { return depth * kLanes * bits / 8; }
};

// Quantised rows: q [rows][stride], zeros behind each row's end.
struct Rows8 {
    Input* q;
    float* scale;
    int32_t* sum;
    int64_t stride;
};

INLINE void quantize_row(const float* x, int64_t size, const Rows8& to, int64_t row) {
    Floats top = {};
    for (int64_t i = 0; i < size; i += kLanes) top = larger(top, magnitude(load_some(x + i, lanes_left(i, size))));
    const float peak = max_of(top), inverse = peak > 0 ? 127.0f / peak : 0.0f;
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

// Unpacks one panel of 4-bit weights to the byte layout. A 16-bit lane holds two inputs of one step of four and two of the next.
INLINE void unpack_panel(const Linear& w, int64_t panel, uint8_t* to) {
    typedef uint16_t Shorts __attribute__((vector_size(4 * kNative)));
    typedef uint8_t Narrow __attribute__((vector_size(kNative)));
    const int64_t groups = w.depth / kGroup;
    const uint8_t* from = w.weight + panel * w.panel_bytes();
    const uint8_t* scales = w.group_scale + panel * groups * kLanes;
    for (int64_t group = 0; group < groups; group++, from += 256, to += 512, scales += kLanes)
        for (int part = 0; part < kParts; part++) {
            const NativeInts wide = __builtin_convertvector(load<Narrow>(scales + part * kNative), NativeInts);
            const Shorts scale = (Shorts)(wide | wide << 16), base = (128 - 8 * scale) * 0x0101;
            const uint8_t* x_at = from + part * sizeof(Shorts);
            uint8_t* out = to + part * sizeof(Shorts);
            for (int pair = 0; pair < 4; pair++, x_at += 64, out += 128) {
                const Shorts x = load<Shorts>(x_at);
                store(out, (x & 15) * scale + (((x >> 4) & 15) * scale << 8) + base);
                store(out + 64, ((x >> 8) & 15) * scale + ((x >> 12) * scale << 8) + base);
            }
        }
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

// Turns sums of one panel into outputs.
struct Finish {
    const Rows8& a;
    const Target& to;
    int64_t channel;
    int count;
    Floats scale, bias;

    Finish(const Linear& w, const Rows8& rows, const Target& target, int64_t panel)
        : a(rows), to(target), channel(panel * kLanes), count(lanes_left(channel, w.outputs)),
          scale(load<Floats>(w.scale + channel)), bias(w.bias ? load<Floats>(w.bias + channel) : Floats{}) {}

    __attribute__((always_inline)) void row(Ints sum, int64_t row) const {
        float* out = to.out + row * to.stride + channel - to.first;
        Floats value = to_floats(sum) * a.scale[row] * scale + bias;
        if (to.add) value += load_some(out, count);
        store_some(out, value, count);
    }
};

// Unless every loop over sums is unrolled, clang keeps them in memory. GCC does not, and is slower with longer code.
#if defined(__clang__)
#define UNMASK_UNROLL_IN_CLANG _Pragma("unroll")
#else
#define UNMASK_UNROLL_IN_CLANG
#endif

// R rows by P panels, kept in registers.
template <int R, int P>
static void gemm_tile(const Linear& w, const uint8_t* weights, int64_t panel, const Rows8& a, int64_t row, const Target& to,
                      Ahead ahead) {
    constexpr int kSums = P * kParts;
    const int64_t panel_bytes = w.depth * kLanes, stride = a.stride;
    const Input* q[(R + 2) / 3];  // of every third row: an address can say one or two strides from there
    for (int i = 0; 3 * i < R; i++) q[i] = a.q + (row + 3 * i) * stride;
    NativeInts sums[R][kSums];
    UNMASK_UNROLL_IN_CLANG
    for (int r = 0; r < R; r++)
        UNMASK_UNROLL_IN_CLANG
        for (int p = 0; p < kSums; p++) sums[r][p] = splat_to<NativeInts>(-kWeightOffset * a.sum[row + r]);
    for (int64_t k = 0; k < w.depth; k += kStep, weights += kStep * kLanes) {
        ahead.fetch();
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
    UNMASK_UNROLL_IN_CLANG
    for (int p = 0; p < P; p++) {
        const Finish finish(w, a, to, panel + p);
        UNMASK_UNROLL_IN_CLANG
        for (int r = 0; r < R; r++) finish.row(load<Ints>(sums[r] + p * kParts), row + r);
    }
}

using Tile = void (*)(const Linear&, const uint8_t*, int64_t, const Rows8&, int64_t, const Target&, Ahead);

template <int P, int... R>
static Tile tile_of(int64_t rows, std::integer_sequence<int, R...>) {
    static constexpr Tile tiles[] = {gemm_tile<R + 1, P>...};
    return tiles[rows - 1];
}

template <int P = kTilePanels>
static Tile tile_of(int64_t rows, int64_t panels) {
    if constexpr (P > 1)
        if (panels < P) return tile_of<P - 1>(rows, panels);
    return tile_of<P>(rows, std::make_integer_sequence<int, kTileRows>());
}

#if defined(UNMASK_AMX)
#include "amx.h"
#else
// Rows of the next tile, when there are so many left.
INLINE int64_t tile_height(int64_t rows) { return std::min<int64_t>(kTileRows, rows); }
#endif

// Rows x panels of a product. `unpacked` holds kTilePanels panels of bytes, for 4-bit weights.
static void gemm(const Linear& w, const Rows8& a, Range rows, Range panels, const Target& to, uint8_t* unpacked) {
    constexpr int64_t kRowBlock = 256;  // rows that stay in the second-level cache
    for (int64_t start = rows.from; start < rows.to; start += kRowBlock) {
        const int64_t stop = std::min(start + kRowBlock, rows.to);
        int64_t tiles = 0;
        for (int64_t row = start; row < stop; row += tile_height(stop - row)) tiles++;
        for (int64_t panel = panels.from; panel < panels.to; panel += kTilePanels) {
            const int64_t wide = std::min<int64_t>(kTilePanels, panels.to - panel);
            const uint8_t* weights = w.bits == 8 ? w.weight + panel * w.panel_bytes() : unpacked;
            for (int64_t p = 0; w.bits == 4 && p < wide; p++) unpack_panel(w, panel + p, unpacked + p * w.depth * kLanes);
            // The next panels come from memory while these are computed on, a part with each tile.
            const int64_t lines = (wide * w.bits * (kStep / 4) + 8 * tiles - 1) / (8 * tiles);
            Ahead ahead = {w.weight + (panel + wide) * w.panel_bytes(), lines};
            for (int64_t row = start; row < stop; ahead.from += lines * w.depth / kStep * 64) {
                const int64_t tall = tile_height(stop - row);
#if defined(UNMASK_AMX)
                if (tall > kTileRows)
                    amx_tiles(w, weights, panel, wide, a, row, tall, to, ahead);
                else
#endif
                    tile_of(tall, wide)(w, weights, panel, a, row, to, ahead);
                row += tall;
            }
        }
    }
}
