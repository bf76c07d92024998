// Matrix products of rows with weights of any kind, tile by tile.
#pragma once

#include <utility>

#include "float_tiles.h"
#include "group_tiles.h"

template <class Tiles, int P, int... R>
static void (*tile_of(int64_t rows, std::integer_sequence<int, R...>))(const Tile&) {
    static constexpr void (*tiles[])(const Tile&) = {Tiles::template tile<R + 1, P>...};
    return tiles[rows - 1];
}

// Computes a tile of so many rows and panels, at most kRows and kPanels; or many rows, where there are tiles for them.
template <class Tiles, int P = Tiles::kPanels>
static void compute(const Tile& t, int64_t rows, int64_t panels) {
    if constexpr (Tiles::kManyRows > 0)
        if (rows > Tiles::kRows) return Tiles::many(t, rows, panels);
    if constexpr (P > 1)
        if (panels < P) return compute<Tiles, P - 1>(t, rows, panels);
    tile_of<Tiles, P>(rows, std::make_integer_sequence<int, Tiles::kRows>())(t);
}

// Rows beyond which tiles of many rows are faster, where there are any.
constexpr int64_t kRegisterRows = 24;

// Rows of the next tile, when there are so many left: about the same for all.
template <class Tiles>
INLINE int64_t tile_height(int64_t rows) {
    if (Tiles::kManyRows > 0 && rows > kRegisterRows) return std::min<int64_t>(rows, Tiles::kManyRows);
    const int64_t tiles = (rows + Tiles::kRows - 1) / Tiles::kRows;
    return (rows + tiles - 1) / tiles;
}

// Panels of a tile of so many rows.
template <class Tiles>
INLINE int64_t tile_width(int64_t rows) {
    return Tiles::kPanels > kTallPanels && kWideRows < rows && rows <= Tiles::kRows ? kTallPanels : Tiles::kPanels;
}

#if defined(UNMASK_AMX)
#include "amx.h"
template <class Tiles>
using BestTiles = AmxTiles<Tiles>;
#else
template <class Tiles>
using BestTiles = Tiles;
#endif

template <class Tiles>
static void multiply(const Linear& w, const Rows& a, Range rows, Range panels, const Target& to) {
    const int64_t block = Tiles::row_block(w.depth), chunk = std::min(Tiles::kDepth, w.depth);
    for (int64_t start = rows.from; start < rows.to; start += block) {
        const int64_t stop = std::min(start + block, rows.to), height = tile_height<Tiles>(stop - start);
        const int64_t tiles = (stop - start + height - 1) / height, widest = tile_width<Tiles>(height);
        for (int64_t panel = panels.from; panel < panels.to; panel += widest) {
            const int64_t wide = std::min(widest, panels.to - panel);
            const uint8_t *weights = w.weight + panel * w.panel_bytes(), *end = weights + w.panel_bytes();
            const uint8_t* next = panel + wide < panels.to ? weights + wide * w.panel_bytes() : nullptr;  // behind the range, others read
            Ahead ahead(tiles, weights + w.head_bytes(), end, next);
            for (int64_t from = 0; from < w.depth; from += chunk) {
                const int64_t depth = std::min(chunk, w.depth - from);
                for (int64_t row = start; row < stop;) {
                    const int64_t tall = tile_height<Tiles>(stop - row);
                    compute<Tiles>({w, weights + w.bytes_of(from), panel, a, row, {from, from + depth}, to, ahead}, tall, wide);
                    row += tall;
                }
            }
        }
    }
}

// Rows x panels of a product.
static void gemm(const Linear& w, const Rows& a, Range rows, Range panels, const Target& to) {
    switch (w.bits) {
        case 32: return multiply<FloatTiles<32>>(w, a, rows, panels, to);
        case 16: return multiply<FloatTiles<16>>(w, a, rows, panels, to);
        case 8: return (w.by_group ? multiply<BestTiles<GroupTiles<8>>> : multiply<BestTiles<Int8Tiles>>)(w, a, rows, panels, to);
        case 4: return multiply<BestTiles<GroupTiles<4>>>(w, a, rows, panels, to);
    }
}
