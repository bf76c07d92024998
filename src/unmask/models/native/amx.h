// Matrix products of many rows in AMX tiles; part of gemm.h.
//
// A tile of inputs is 16 rows x 64 inputs, a tile of weights 64 inputs of a panel as they lie: [16][channel][4].
#pragma once

constexpr int64_t kAmxRows = 16, kAmxInputs = 64;

// Of 8-bit weights, or 4-bit ones unpacked to bytes.
struct AmxTiles : Int8Tiles {};

// With fewer rows the tiles of registers are faster.
template <>
inline int64_t tile_height<AmxTiles>(int64_t rows) {
    return std::min<int64_t>(rows, rows > kTileRows ? 2 * kAmxRows : kTileRows);
}

template <>
inline const uint8_t* weights_of_panels<AmxTiles>(const Linear& w, int64_t panel, int64_t count, uint8_t* unpacked) {
    if (w.bits == 8) return w.weight + panel * w.panel_bytes();
    for (int64_t p = 0; p < count; p++) unpack_panel(w, panel + p, unpacked + p * w.depth * kLanes);
    return unpacked;
}

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
static void amx_tile(const Tile& t, int64_t rows) {
    const Linear& w = t.w;
    const Rows& a = t.a;
    Ahead ahead = t.ahead;
    const int64_t panel_bytes = w.depth * kLanes, upper = std::min(rows, kAmxRows);
    const TileShapes shapes(upper, rows - upper);
    _tile_loadconfig(&shapes);  // makes all tiles zero
    const Input *q = a.q + t.row * a.stride, *q_lower = q + kAmxRows * a.stride;
    alignas(64) uint8_t ends[P][kAmxInputs * kLanes];
    for (int64_t k = 0; k < w.depth; k += kAmxInputs, q += kAmxInputs, q_lower += kAmxInputs) {
        for (int64_t step = 0; step < kAmxInputs; step += kStep) ahead.fetch();
        const uint8_t *first = t.weights + k * kLanes, *second = first + panel_bytes;
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
        const Finish finish(w, a, t.to, t.panel + p);
        for (int64_t r = 0; r < rows; r++) {
            const Ints sum = load<Ints>(sums[r / kAmxRows * 2 + p][r % kAmxRows]);
            finish.row(sum - kWeightOffset * a.sum[t.row + r], t.row + r);
        }
    }
}

// Up to 32 rows by up to kPanels panels, two at a time.
template <>
inline void compute<AmxTiles, AmxTiles::kPanels>(const Tile& t, int64_t rows, int64_t panels) {
    if (rows <= kTileRows) return compute<Int8Tiles>(t, rows, panels);
    Tile two = t;
    for (int64_t p = 0; p < panels; p += 2, two.panel += 2, two.weights += 2 * t.w.depth * kLanes) {
        const auto tile = panels - p == 1 ? (rows > kAmxRows ? amx_tile<1, true> : amx_tile<1, false>)
                                          : (rows > kAmxRows ? amx_tile<2, true> : amx_tile<2, false>);
        tile(two, rows);
        two.ahead.lines = 0;
    }
}
