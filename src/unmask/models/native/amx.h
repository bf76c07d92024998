// Matrix products of many rows in AMX tiles; part of gemm.h.
//
// A tile of inputs is 16 rows x 64 inputs, a tile of weights 64 inputs of a panel as they lie: [16][channel][4].
#pragma once

constexpr int64_t kAmxRows = 16, kAmxInputs = 64;

// With fewer rows the tiles of registers are faster.
INLINE int64_t tile_height(int64_t rows) { return std::min<int64_t>(rows, rows > kTileRows ? 2 * kAmxRows : kTileRows); }

// What ldtilecfg reads. Tiles 0..3 are sums (upper and lower rows, first and second panel), 4 and 5 inputs, 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int64_t upper, int64_t lower) {
        const int64_t heights[] = {upper, upper, lower, lower, upper, lower, kAmxInputs / 4, kAmxInputs / 4};
        for (int tile = 0; tile < 8; tile++) rows[tile] = uint8_t(heights[tile]), row_bytes[tile] = heights[tile] ? 64 : 0;
    }
};

// Up to 32 rows by P (1 or 2) panels; kLower: more than 16 rows.
template <int P, bool kLower>
static void amx_tile(const Linear& w, const uint8_t* weights, int64_t panel, const Rows8& a, int64_t row, int64_t rows,
                     const Target& to, Ahead ahead) {
    const int64_t panel_bytes = w.depth * kLanes, upper = std::min(rows, kAmxRows);
    const TileShapes shapes(upper, rows - upper);
    _tile_loadconfig(&shapes);  // makes all tiles zero
    const Input *q = a.q + row * a.stride, *q_lower = q + kAmxRows * a.stride;
    alignas(64) uint8_t ends[P][kAmxInputs * kLanes];
    for (int64_t k = 0; k < w.depth; k += kAmxInputs, q += kAmxInputs, q_lower += kAmxInputs) {
        for (int64_t step = 0; step < kAmxInputs; step += kStep) ahead.fetch();
        const uint8_t *first = weights + k * kLanes, *second = first + panel_bytes;
        if (w.depth - k < kAmxInputs) {  // behind the end rows are zero, but weights must be there
            memset(ends, 0, sizeof ends);
            for (int p = 0; p < P; p++) memcpy(ends[p], first + p * panel_bytes, (w.depth - k) * kLanes);
            first = ends[0], second = ends[P - 1];
        }
        _tile_loadd(4, q, a.stride);
        _tile_loadd(6, first, 64);
        _tile_dpbsud(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, second, 64);
            _tile_dpbsud(1, 4, 7);
        }
        if constexpr (kLower) {
            _tile_loadd(5, q_lower, a.stride);
            _tile_dpbsud(2, 5, 6);
            if constexpr (P == 2) _tile_dpbsud(3, 5, 7);
        }
    }
    alignas(64) int32_t sums[4][kAmxRows][kLanes];
    _tile_stored(0, sums[0], 64);
    if constexpr (P == 2) _tile_stored(1, sums[1], 64);
    if constexpr (kLower) _tile_stored(2, sums[2], 64);
    if constexpr (kLower && P == 2) _tile_stored(3, sums[3], 64);
    _tile_release();
    for (int p = 0; p < P; p++) {
        const Finish finish(w, a, to, panel + p);
        for (int64_t r = 0; r < rows; r++) {
            const Ints sum = load<Ints>(sums[r / kAmxRows * 2 + p][r % kAmxRows]);
            finish.row(sum - kWeightOffset * a.sum[row + r], row + r);
        }
    }
}

// Up to 32 rows by up to kTilePanels panels, two at a time.
static void amx_tiles(const Linear& w, const uint8_t* weights, int64_t panel, int64_t panels, const Rows8& a, int64_t row,
                      int64_t rows, const Target& to, Ahead ahead) {
    for (int64_t p = 0; p < panels; p += 2) {
        const auto tile = panels - p == 1 ? (rows > kAmxRows ? amx_tile<1, true> : amx_tile<1, false>)
                                          : (rows > kAmxRows ? amx_tile<2, true> : amx_tile<2, false>);
        tile(w, weights + p * w.depth * kLanes, panel + p, a, row, rows, to, ahead);
        ahead.lines = 0;
    }
}
