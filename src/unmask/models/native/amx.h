// Matrix products of many rows in AMX tiles; part of gemm.h.
//
// A tile of inputs is 16 rows x 64 inputs, a tile of weights 64 inputs of a panel as they lie: [16][channel][4]. Where sums end with each
// group of inputs it is 32 of them, and codes of 4 bits are expanded to bytes before.
#pragma once

constexpr int64_t kAmxRows = 16, kAmxInputs = 64;

// Before a tile instruction reads memory: GCC's intrinsics do not say what they read (a pointer's worth of a configuration, nothing of
// a tile), so that it may leave out or postpone what was stored there.
INLINE void stored(const void* first, const void* second = nullptr) { __asm__ volatile("" : : "r"(first), "r"(second) : "memory"); }

// What ldtilecfg reads. Tiles 0..3 are sums (upper and lower rows, first and second panel), 4 and 5 inputs, 6 and 7 weights.
struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    TileShapes(int64_t upper, int64_t lower, int64_t inputs) {
        const int64_t heights[] = {upper, upper, lower, lower, upper, lower, inputs / 4, inputs / 4};
        for (int tile = 0; tile < 8; tile++) {
            const bool is_inputs = tile == 4 || tile == 5;
            rows[tile] = uint8_t(heights[tile]), row_bytes[tile] = !heights[tile] ? 0 : is_inputs ? uint16_t(inputs) : 64;
        }
    }
};

// Up to 32 rows, the lower ones from the 17th on, whose inputs are multiplied with weights of one or two panels, step by step.
struct AmxInputs {
    const Input *upper, *lower;
    int64_t stride, step;

    // Makes all sums zero.
    AmxInputs(const Input* from, int64_t row_stride, int64_t rows, int64_t inputs)
        : upper(from), lower(from + kAmxRows * row_stride), stride(row_stride), step(inputs) {
        const int64_t height = std::min(rows, kAmxRows);
        const TileShapes shapes(height, rows - height, inputs);
        stored(&shapes);
        _tile_loadconfig(&shapes);
    }

    template <int P, bool kLower>
    __attribute__((always_inline)) void multiply(const uint8_t* first, const uint8_t* second) {
        _tile_loadd(4, upper, stride);
        _tile_loadd(6, first, 64);
        _tile_dpbsud(0, 4, 6);
        if constexpr (P == 2) {
            _tile_loadd(7, second, 64);
            _tile_dpbsud(1, 4, 7);
        }
        if constexpr (kLower) {
            _tile_loadd(5, lower, stride);
            _tile_dpbsud(2, 5, 6);
            if constexpr (P == 2) _tile_dpbsud(3, 5, 7);
        }
        upper += step, lower += step;
    }
};

// Their sums.
struct AmxSums {
    alignas(64) int32_t of[4][kAmxRows][kLanes];

    template <int P, bool kLower>
    __attribute__((always_inline)) void store() {
        _tile_stored(0, of[0], 64);
        if constexpr (P == 2) _tile_stored(1, of[1], 64);
        if constexpr (kLower) _tile_stored(2, of[2], 64);
        if constexpr (kLower && P == 2) _tile_stored(3, of[3], 64);
    }
    Ints row(int64_t row, int panel) const { return load<Ints>(of[row / kAmxRows * 2 + panel][row % kAmxRows]); }
};

// Up to 32 rows by P (1 or 2) panels; kLower: more than 16 rows.
template <int P, bool kLower>
static void amx_tile(const Int8Tiles&, const Tile& t, int64_t rows) {
    const Rows& a = t.a;
    Ahead ahead = t.ahead;
    const int64_t panel_bytes = t.w.panel_bytes();
    AmxInputs inputs(a.q + t.row * a.stride, a.stride, rows, kAmxInputs);
    alignas(64) uint8_t ends[P][kAmxInputs * kLanes];
    for (int64_t k = 0; k < t.w.depth; k += kAmxInputs) {
        ahead.fetch<P, kAmxInputs * kLanes>(panel_bytes);
        const uint8_t *first = t.weights + k * kLanes, *second = first + panel_bytes;
        if (t.w.depth - k < kAmxInputs) {  // behind the end rows are zero, but weights must be there
            memset(ends, 0, sizeof ends);
            for (int p = 0; p < P; p++) memcpy(ends[p], first + p * panel_bytes, (t.w.depth - k) * kLanes);
            first = ends[0], second = ends[P - 1];
        }
        inputs.multiply<P, kLower>(first, second);
    }
    AmxSums sums;
    sums.store<P, kLower>();
    _tile_release();
    t.ahead = ahead;
    for (int p = 0; p < P; p++) {
        const Finish finish(t.w, t.to, t.panel + p);
        for (int64_t r = 0; r < rows; r++) {
            const Ints sum = sums.row(r, p) - kWeightOffset * a.sum[t.row + r];
            finish.row(to_floats(sum) * a.scale[t.row + r], t.row + r);
        }
    }
}

template <int P, bool kLower>
INLINE void zero_sums() {
    _tile_zero(0);
    if constexpr (P == 2) _tile_zero(1);
    if constexpr (kLower) _tile_zero(2);
    if constexpr (kLower && P == 2) _tile_zero(3);
}

// The codes of a group as bytes.
INLINE void expand(const uint8_t* from, uint8_t* to) {
    for (int64_t k = 0; k < kGroup; k += 8, from += 4 * kLanes, to += 8 * kLanes)
        for (int half = 0; half < 2; half++) store(to + half * 4 * kLanes, codes_of(load<NativeInts>(from), half, 0));
}

template <int P, bool kLower, int kBits>
static void amx_tile(const GroupTiles<kBits>&, const Tile& t, int64_t rows) {
    const Rows& a = t.a;
    Ahead ahead = t.ahead;
    const int64_t panel_bytes = t.w.panel_bytes(), row_groups = a.stride / kGroup;
    AmxInputs inputs(a.group_q + t.row * a.stride, a.stride, rows, kGroup);
    const InputGroup* groups = a.groups + t.row * row_groups;
    const uint8_t *scales = t.weights, *weights = t.weights + t.w.head_bytes();
    alignas(64) uint8_t bytes[P][kGroup * kLanes];
    AmxSums sums;
    Floats totals[P][2 * kAmxRows] = {};
    for (int64_t group = 0; group < t.w.depth / kGroup; group++, weights += kGroup * kLanes * kBits / 8) {
        ahead.fetch<P, kGroup * kLanes * kBits / 8>(panel_bytes);
        const uint8_t *first = weights, *second = weights + panel_bytes;
        if constexpr (kBits == 4) {
            for (int p = 0; p < P; p++) expand(weights + p * panel_bytes, bytes[p]);
            first = bytes[0], second = bytes[P - 1];
        }
        zero_sums<P, kLower>();
        inputs.multiply<P, kLower>(first, second);
        sums.store<P, kLower>();
        for (int p = 0; p < P; p++) {
            const GroupScale<kBits> scale(scales + p * panel_bytes + group * 2 * kLanes);
            for (int64_t r = 0; r < rows; r++)
                totals[p][r] = scale.add(totals[p][r], sums.row(r, p), groups[r * row_groups + group]);
        }
    }
    _tile_release();
    t.ahead = ahead;
    for (int p = 0; p < P; p++) {
        const Finish finish(t.w, t.to, t.panel + p);
        for (int64_t r = 0; r < rows; r++) finish.row(totals[p][r], t.row + r);
    }
}

// Up to 32 rows by up to kPanels panels, two at a time.
template <class Tiles>
struct AmxTiles : Tiles {
    static constexpr int64_t kManyRows = 2 * kAmxRows;

    static void many(const Tile& t, int64_t rows, int64_t panels) {
        const int64_t panel_bytes = t.w.panel_bytes();
        Ahead near = t.ahead;
        Tile two = {t.w, t.weights, t.panel, t.a, t.row, t.depth, t.to, t.ahead.tiles > 1 ? t.ahead : near};
        for (int64_t p = 0; p < panels; p += 2, two.panel += 2, two.weights += 2 * panel_bytes) {
            const bool is_one = panels - p == 1;
            const uint8_t* next = panels - p > 2 ? two.weights + 2 * panel_bytes : t.ahead.next;  // of rows that are one tile
            near = Ahead(1, two.weights + t.w.head_bytes(), two.weights + panel_bytes, next);
            if (rows > kAmxRows) is_one ? amx_tile<1, true>(Tiles(), two, rows) : amx_tile<2, true>(Tiles(), two, rows);
            else is_one ? amx_tile<1, false>(Tiles(), two, rows) : amx_tile<2, false>(Tiles(), two, rows);
        }
    }
};
