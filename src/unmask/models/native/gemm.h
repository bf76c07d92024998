// Matrix products of rows with weights of any kind, tile by tile.
#pragma once

#include <utility>

#include "float_tiles.h"
#include "int4_tiles.h"

template <class Tiles, int P, int... R>
static void (*tile_of(int64_t rows, std::integer_sequence<int, R...>))(const Tile&) {
    static constexpr void (*tiles[])(const Tile&) = {Tiles::template tile<R + 1, P>...};
    return tiles[rows - 1];
}

// Computes a tile of so many rows and panels, at most kRows and kPanels.
template <class Tiles, int P = Tiles::kPanels>
static void compute(const Tile& t, int64_t rows, int64_t panels) {
    if constexpr (P > 1)
        if (panels < P) return compute<Tiles, P - 1>(t, rows, panels);
    tile_of<Tiles, P>(rows, std::make_integer_sequence<int, Tiles::kRows>())(t);
}

// Rows of the next tile, when there are so many left: about the same for all.
template <class Tiles>
INLINE int64_t tile_height(int64_t rows) {
    const int64_t tiles = (rows + Tiles::kRows - 1) / Tiles::kRows;
    return (rows + tiles - 1) / tiles;
}

// The weights of some panels as tiles read them.
template <class Tiles>
INLINE const uint8_t* weights_of_panels(const Linear& w, int64_t panel, int64_t, uint8_t*) {
    return w.weight + panel * w.panel_bytes();
}

#if defined(UNMASK_AMX)
#include "amx.h"
#endif

template <class Tiles>
static void multiply(const Linear& w, const Rows& a, Range rows, Range panels, const Target& to, uint8_t* unpacked = nullptr) {
    const int64_t block = Tiles::row_block(w.depth), chunk = std::min(Tiles::kDepth, w.depth);
    for (int64_t start = rows.from; start < rows.to; start += block) {
        const int64_t stop = std::min(start + block, rows.to), height = tile_height<Tiles>(stop - start);
        const int64_t tiles = (stop - start + height - 1) / height;
        for (int64_t panel = panels.from; panel < panels.to; panel += Tiles::kPanels) {
            const int64_t wide = std::min<int64_t>(Tiles::kPanels, panels.to - panel);
            const uint8_t* weights = weights_of_panels<Tiles>(w, panel, wide, unpacked);
            // The next panels come from memory while these are computed on, a part with each tile.
            const int64_t lines = (wide * w.bytes_of(kStep) + 64 * tiles - 1) / (64 * tiles);
            Ahead ahead = {w.weight + (panel + wide) * w.panel_bytes(), lines};
            for (int64_t from = 0; from < w.depth; from += chunk) {
                const int64_t depth = std::min(chunk, w.depth - from);
                for (int64_t row = start; row < stop; ahead.from += lines * depth / kStep * 64) {
                    const int64_t tall = tile_height<Tiles>(stop - row);
                    compute<Tiles>({w, weights + w.bytes_of(from), panel, a, row, {from, from + depth}, to, ahead}, tall, wide);
                    row += tall;
                }
            }
        }
    }
}

// Memory that a thread's products need, where tiles read 4-bit weights as bytes.
static int64_t unpacked_bytes(const Linear& w) {
#if defined(UNMASK_AMX)
    return w.bits == 4 ? w.depth * kLanes * AmxTiles::kPanels : 0;
#else
    (void)w;
    return 0;
#endif
}

// Rows x panels of a product; `unpacked`: `unpacked_bytes` of memory.
static void gemm(const Linear& w, const Rows& a, Range rows, Range panels, const Target& to, [[maybe_unused]] uint8_t* unpacked) {
    switch (w.bits) {
        case 32: return multiply<FloatTiles<32>>(w, a, rows, panels, to);
        case 16: return multiply<FloatTiles<16>>(w, a, rows, panels, to);
#if defined(UNMASK_AMX)
        case 8: return multiply<AmxTiles>(w, a, rows, panels, to);
        case 4:
            if (rows.to - rows.from > kTileRows) return multiply<AmxTiles>(w, a, rows, panels, to, unpacked);
            return multiply<Int4Tiles>(w, a, rows, panels, to);
#else
        case 8: return multiply<Int8Tiles>(w, a, rows, panels, to);
        case 4: return multiply<Int4Tiles>(w, a, rows, panels, to);
#endif
    }
}
