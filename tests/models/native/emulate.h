// Instructions of processors that a test may not run on, in plain C++: for the kernels' variants that use them.
//
// Included by vector.h under -DUNMASK_EMULATE, with UNMASK_AVX512, UNMASK_AVX512 and UNMASK_AMX, or UNMASK_AVX2 and UNMASK_AVXVNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

template <class V>
static inline V dpbusd(V sum, V unsigneds, V signeds) {
    int32_t out[sizeof(V) / 4];
    uint8_t u[sizeof(V)];
    int8_t s[sizeof(V)];
    memcpy(out, &sum, sizeof(V)), memcpy(u, &unsigneds, sizeof(V)), memcpy(s, &signeds, sizeof(V));
    for (size_t i = 0; i < sizeof(V); i++) out[i / 4] += u[i] * s[i];
    memcpy(&sum, out, sizeof(V));
    return sum;
}

static inline __m512 fmadd(__m512 a, __m512 b, __m512 c) {
    __m256 x[2], y[2], z[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int half = 0; half < 2; half++) z[half] = _mm256_fmadd_ps(x[half], y[half], z[half]);
    memcpy(&c, z, 64);
    return c;
}

static inline __m512 larger(__m512 a, __m512 b) {
    __m256 x[2], y[2];
    memcpy(x, &a, 64), memcpy(y, &b, 64);
    for (int half = 0; half < 2; half++) y[half] = _mm256_max_ps(x[half], y[half]);
    memcpy(&b, y, 64);
    return b;
}

static inline __m512i widened(__m128i bytes) {
    uint8_t narrow[16];
    int32_t wide[16];
    memcpy(narrow, &bytes, 16);
    for (int i = 0; i < 16; i++) wide[i] = narrow[i];
    __m512i out;
    memcpy(&out, wide, 64);
    return out;
}

// The tile registers of a thread.
struct Tiles {
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } shapes;
    uint8_t data[8][16][64];

    static void check(bool right, const char* what) {
        if (!right) std::fprintf(stderr, "tiles: %s\n", what), std::abort();
    }
    void configure(const void* from) {
        memcpy(&shapes, from, sizeof shapes);
        memset(data, 0, sizeof data);
        check(shapes.palette == 1 && shapes.start_row == 0, "palette or start row");
        for (int tile = 0; tile < 16; tile++) {
            const int rows = shapes.rows[tile], bytes = shapes.row_bytes[tile];
            check(rows <= 16 && bytes <= 64 && (rows == 0) == (bytes == 0) && (tile < 8 || rows == 0), "a shape");
        }
    }
    void load(int tile, const void* from, int64_t stride) {
        check(shapes.palette == 1 && shapes.rows[tile] > 0, "load of a tile without a shape");
        for (int row = 0; row < shapes.rows[tile]; row++)
            memcpy(data[tile][row], static_cast<const char*>(from) + row * stride, shapes.row_bytes[tile]);
    }
    void store(int tile, void* to, int64_t stride) const {
        check(shapes.palette == 1 && shapes.rows[tile] > 0, "store of a tile without a shape");
        for (int row = 0; row < shapes.rows[tile]; row++)
            memcpy(static_cast<char*>(to) + row * stride, data[tile][row], shapes.row_bytes[tile]);
    }
    void zero(int tile) {
        check(shapes.palette == 1 && shapes.rows[tile] > 0, "zero of a tile without a shape");
        memset(data[tile], 0, sizeof data[tile]);
    }
    void dpbsud(int sum, int a, int b) {
        const int rows = shapes.rows[sum], columns = shapes.row_bytes[sum] / 4, inner = shapes.row_bytes[a] / 4;
        check(rows > 0 && shapes.rows[a] == rows && shapes.rows[b] == inner && shapes.row_bytes[b] == 4 * columns, "a product");
        for (int m = 0; m < rows; m++)
            for (int n = 0; n < columns; n++) {
                int32_t total;
                memcpy(&total, data[sum][m] + 4 * n, 4);
                for (int k = 0; k < 4 * inner; k++) total += int8_t(data[a][m][k]) * data[b][k / 4][4 * n + k % 4];
                memcpy(data[sum][m] + 4 * n, &total, 4);
            }
    }
};
static thread_local Tiles tiles;

}  // namespace emulated

#undef _mm512_fmadd_ps
#undef _mm512_max_ps
#undef _mm512_cvtepu8_epi32
#undef _mm512_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_max_ps emulated::larger
#define _mm512_cvtepu8_epi32 emulated::widened
#define _mm512_dpbusd_epi32 emulated::dpbusd<__m512i>
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd<__m256i>
#define _tile_loadconfig(from) emulated::tiles.configure(from)
#define _tile_release() memset(&emulated::tiles, 0, sizeof emulated::tiles)
#define _tile_loadd(tile, from, stride) emulated::tiles.load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated::tiles.store(tile, to, stride)
#define _tile_zero(tile) emulated::tiles.zero(tile)
#define _tile_dpbsud(sum, a, b) emulated::tiles.dpbsud(sum, a, b)
