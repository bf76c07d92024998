// Matrix products with 8-bit activations and 8- or 4-bit weights.
//
// Activations are quantised per row (signed, scale = max |x| / 127), weights per output channel. Sums are exact 32-bit integers,
// so a row's result depends neither on the other rows nor on how work is cut up.
//
// Weights lie in panels of 16 channels, [panel][K / 4][channel][4], as unsigned bytes w + 128, which is what the dot product
// instruction takes; 128 * (sum of the row) is subtracted again. 4-bit weights are (q - 8) * s with a small integer s per 32
// inputs of a channel: their panels are [K / 32][4][channel][8 nibbles], unpacked to bytes before use.
#pragma once

#include <algorithm>

#include "threads.h"
#include "vector.h"

#if defined(UNMASK_VNNI)
constexpr int kTileRows = 8, kTilePanels = 3;  // 24 sums, 3 weights and an activation in 32 registers
#else
constexpr int kTileRows = 2, kTilePanels = 1;
#endif
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
    int8_t* q;
    float* scale;
    int32_t* sum;
    int64_t stride;
};

INLINE void quantize_row(const float* x, int64_t size, const Rows8& to, int64_t row) {
    Floats top = {};
    for (int64_t i = 0; i < size; i += kLanes) top = larger(top, magnitude(load_some(x + i, lanes_left(i, size))));
    const float peak = max_of(top), inverse = peak > 0 ? 127.0f / peak : 0.0f;
    int8_t* q = to.q + row * to.stride;
    Ints total = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const Ints rounded = nearest(load_some(x + i, lanes_left(i, size)) * inverse);
        store(q + i, __builtin_convertvector(rounded, Bytes));
        total += rounded;
    }
    const int64_t end = (size + kLanes - 1) / kLanes * kLanes;
    memset(q + end, 0, to.stride - end);
    to.scale[row] = peak / 127.0f;
    to.sum[row] = 0;
    for (int lane = 0; lane < kLanes; lane++) to.sum[row] += total[lane];
}

// Unpacks one panel of 4-bit weights to the byte layout. A 16-bit lane holds two inputs of one step of four and two of the next.
INLINE void unpack_panel(const Linear& w, int64_t panel, uint8_t* to) {
    typedef uint16_t Shorts __attribute__((vector_size(64)));
    const int64_t groups = w.depth / kGroup;
    const uint8_t* from = w.weight + panel * w.panel_bytes();
    const uint8_t* scales = w.group_scale + panel * groups * kLanes;
    for (int64_t group = 0; group < groups; group++) {
        const Ints wide = __builtin_convertvector(load<Bytes>(scales + group * kLanes), Ints);
        const Shorts scale = (Shorts)(wide | wide << 16), base = (128 - 8 * scale) * 0x0101;
        for (int pair = 0; pair < 4; pair++, from += 64, to += 128) {
            const Shorts x = load<Shorts>(from);
            store(to, (x & 15) * scale + (((x >> 4) & 15) * scale << 8) + base);
            store(to + 64, ((x >> 8) & 15) * scale + ((x >> 12) * scale << 8) + base);
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
};

// R rows by P panels, kept in registers.
template <int R, int P>
static void gemm_tile(const Linear& w, const uint8_t* weights, int64_t panel, const Rows8& a, int64_t row, const Target& to,
                      Ahead ahead) {
    const int64_t panel_bytes = w.depth * kLanes, stride = a.stride;
    const int8_t* q[(R + 2) / 3];  // of every third row: an address can say one or two strides from there
    for (int i = 0; 3 * i < R; i++) q[i] = a.q + (row + 3 * i) * stride;
    Ints sums[R][P];
    for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) sums[r][p] = splat(-128 * a.sum[row + r]);
    for (int64_t k = 0; k < w.depth; k += kStep, weights += kStep * kLanes) {
        for (int64_t i = 0; i < ahead.lines; i++, ahead.from += 64) __builtin_prefetch(ahead.from, 0, 2);
#pragma GCC unroll 4
        for (int j = 0; j < kStep; j += 4)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t four;
                memcpy(&four, q[r / 3] + r % 3 * stride + j, 4);
#pragma GCC unroll 3
                for (int p = 0; p < P; p++) sums[r][p] = dot4(sums[r][p], weights + p * panel_bytes + j * kLanes, four);
            }
        for (int i = 0; 3 * i < R; i++) q[i] += kStep;
    }
    for (int p = 0; p < P; p++) {
        const int64_t channel = (panel + p) * kLanes;
        const int count = lanes_left(channel, w.outputs);
        const Floats scale = load<Floats>(w.scale + channel), bias = w.bias ? load<Floats>(w.bias + channel) : Floats{};
        for (int r = 0; r < R; r++) {
            float* out = to.out + (row + r) * to.stride + channel - to.first;
            Floats value = to_floats(sums[r][p]) * a.scale[row + r] * scale + bias;
            if (to.add) value += load_some(out, count);
            store_some(out, value, count);
        }
    }
}

using Tile = void (*)(const Linear&, const uint8_t*, int64_t, const Rows8&, int64_t, const Target&, Ahead);

template <int P>
static Tile tile_of(int64_t rows) {
    static constexpr Tile tiles[] = {gemm_tile<1, P>, gemm_tile<2, P>, gemm_tile<3, P>, gemm_tile<4, P>,
                                     gemm_tile<5, P>, gemm_tile<6, P>, gemm_tile<7, P>, gemm_tile<8, P>};
    return tiles[rows - 1];
}

static Tile tile_of(int64_t rows, int64_t panels) {
    return panels == 1 ? tile_of<1>(rows) : panels == 2 ? tile_of<2>(rows) : tile_of<3>(rows);
}

// Rows x panels of a product. `unpacked` holds kTilePanels panels of bytes, for 4-bit weights.
static void gemm(const Linear& w, const Rows8& a, Range rows, Range panels, const Target& to, uint8_t* unpacked) {
    constexpr int64_t kRowBlock = 256;  // rows that stay in the second-level cache
    for (int64_t start = rows.from; start < rows.to; start += kRowBlock) {
        const int64_t stop = std::min(start + kRowBlock, rows.to);
        for (int64_t panel = panels.from; panel < panels.to; panel += kTilePanels) {
            const int64_t wide = std::min<int64_t>(kTilePanels, panels.to - panel);
            const uint8_t* weights = w.bits == 8 ? w.weight + panel * w.panel_bytes() : unpacked;
            for (int64_t p = 0; w.bits == 4 && p < wide; p++) unpack_panel(w, panel + p, unpacked + p * w.depth * kLanes);
            // The next panels come from memory while these are computed on, a part with each tile.
            const int64_t tiles = (stop - start + kTileRows - 1) / kTileRows;
            const int64_t lines = (wide * w.bits * (kStep / 4) + 8 * tiles - 1) / (8 * tiles);
            const uint8_t* next = w.weight + (panel + wide) * w.panel_bytes();
            for (int64_t row = start; row < stop; row += kTileRows, next += lines * w.depth / kStep * 64) {
                const int64_t tall = std::min<int64_t>(kTileRows, stop - row);
                tile_of(tall, wide)(w, weights, panel, a, row, to, {next, lines});
            }
        }
    }
}
