// Operations on one row of floats: norm, rotary embedding, SwiGLU, and the mixing of channels.
#pragma once

#include <cmath>

#include "vector.h"

// x / rms(x) * weight; `to` may be `x`.
INLINE void rms_norm(const float* x, const float* weight, int64_t size, float eps, float* to) {
    Floats squares = {};
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats v = load_some(x + i, lanes_left(i, size));
        squares = fma(v, v, squares);
    }
    const float scale = 1.0f / std::sqrt(sum_of(squares) / float(size) + eps);
    for (int64_t i = 0; i < size; i += kLanes) {
        const int count = lanes_left(i, size);
        store_some(to + i, load_some(x + i, count) * scale * load_some(weight + i, count), count);
    }
}

// Rotates the first `rotary` dimensions of a head, first half against second.
INLINE void rotate(float* head, const float* cos, const float* sin, int64_t rotary) {
    const int64_t half = rotary / 2;
    for (int64_t i = 0; i < half; i += kLanes) {
        const int count = lanes_left(i, half);
        const Floats a = load_some(head + i, count), b = load_some(head + half + i, count);
        const Floats c = load_some(cos + i, count), s = load_some(sin + i, count);
        store_some(head + i, a * c - b * s, count);
        store_some(head + half + i, b * c + a * s, count);
    }
}

// silu(gate) * up
INLINE void swiglu(const float* gate_up, int64_t size, float* to) {
    for (int64_t i = 0; i < size; i += kLanes) {
        const int count = lanes_left(i, size);
        const Floats gate = load_some(gate_up + i, count), up = load_some(gate_up + size + i, count);
        store_some(to + i, gate / (exp_(-gate) + 1.0f) * up, count);
    }
}

// The Hadamard transform, not normalised, of N vectors that stay in registers.
template <int N>
INLINE void mix_block(float* block) {
    Floats x[N];
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) x[i] = load<Floats>(block + i * kLanes);
#pragma GCC unroll 3
    for (int apart = 1; apart < N; apart *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            if (i & apart) continue;
            const Floats a = x[i], b = x[i + apart];
            x[i] = a + b, x[i + apart] = a - b;
        }
#pragma GCC unroll 8
    for (int i = 0; i < N; i++) store(block + i * kLanes, x[i]);
}

// Mixes channels i, i + 16, ... of each block of `count` vectors, 8, 4, 2 or 1 (see rotation.py).
INLINE void mix(float* x, int64_t size, int64_t count) {
    for (float* block = x; count > 1 && block < x + size; block += count * kLanes)
        count == 8 ? mix_block<8>(block) : count == 4 ? mix_block<4>(block) : mix_block<2>(block);
}
