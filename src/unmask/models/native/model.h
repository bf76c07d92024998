// What a forward reads, as Python hands it over, and the memory that it works in.
#pragma once

#include "attention.h"
#include "linear.h"

// A matrix and, unless `in` has no weight, the gated LoRA that noisy rows pass beside it.
struct GatedLinear {
    Linear base, in, out;
};

// The least that a thread takes of a loop: panels of a product as tiles take them, and rows.
constexpr int64_t kPanelGrain = kTilePanels > 1 ? kTilePanels : 2, kRowGrain = 1;

struct Layer {
    GatedLinear qkv, out, gate_up, down;
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm;  // null without per-head norms
};

struct Model {
    const Layer* layers;
    const float* final_norm;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, rotary_dim, ffn, mixed;
    int64_t rank;  // of the updates; 0: there are none
    float eps;

    // A row of gate and up values, off multiples of a page, where rows would share cache sets.
    int64_t gate_up_stride() const { return 2 * ffn + kLanes; }
    int64_t attended() const { return heads * head_dim; }
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// Keys and values [layer][key | value][kv head][slot][head_dim].
struct KVCache {
    float* data;
    int64_t slots;
};

struct ForwardBatch {
    int64_t rows, num_segments;
    const Segment* segments;
    const float *cos, *sin;  // [rows][rotary_dim]
    float* hidden;           // [rows][hidden]: embeddings on entry, hidden states on return
    KVCache kv_cache;
};

// Cuts a buffer into aligned pieces; without a buffer it only measures.
struct Arena {
    char* base;
    int64_t used = 0;

    template <class T>
    T* take(int64_t count) {
        T* out = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return out;
    }
    // Rows for products with weights of so many bits.
    Rows take_rows(int64_t rows, int64_t width, int64_t bits) {
        const int64_t stride = (width + 63) / 64 * 64 + 64;  // off powers of two, where rows would share cache sets
        Rows out = {};
        out.stride = stride;
        if (bits >= 16) {
            out.x = take<float>(rows * stride);
            return out;
        }
        out.q = take<Input>(rows * stride), out.scale = take<float>(rows), out.sum = take<int32_t>(rows);
        if (bits == 4) {
            out.nibble_q = kCopiesNibbleInputs ? take<NibbleInput>(rows * stride) : reinterpret_cast<NibbleInput*>(out.q);
            out.nibble_start = take<int32_t>(rows * stride / kGroup);
        }
        return out;
    }
};
