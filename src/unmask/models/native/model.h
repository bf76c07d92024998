// What a forward reads, as Python hands it over, and the memory that it works in.
#pragma once

#include "attention.h"
#include "linear.h"

// A matrix and, unless `in` has no weight, the gated LoRA that noisy rows pass beside it.
struct GatedLinear {
    Linear base, in, out;

    // That rows are read in.
    int forms() const { return base.form() | in.form(); }
};

// The least that a thread takes of a loop: panels of a product, and rows.
constexpr int64_t kPanelGrain = 2, kRowGrain = 1;
// Rows up to which one thread is as fast as several, which wait for each other: in a loop over rows, and in that over gates.
constexpr int64_t kFewRows = 8, kFewGates = 2;

// Routed experts of a layer. Those of one kind are a stack: a matrix of all their outputs, each expert's padded to panels.
struct Experts {
    Linear router;      // floats
    const float* bias;  // [experts], it only selects
    Linear gate_up, down;
};

struct Layer {
    GatedLinear qkv, out;
    GatedLinear gate_up, down;  // of a dense layer, or of the shared expert
    int64_t ffn, mixed;         // its width, 0 without a shared expert, and how many channels are mixed
    const float *attention_norm, *mlp_norm;
    const float *query_norm, *key_norm;  // null without per-head norms
    const Experts* experts;              // null in a dense layer

    // That what is behind the second norm reads.
    int feed_forms() const { return gate_up.forms() | (experts ? experts->router.form() | experts->gate_up.form() : 0); }
};

// Matrices of a layer that LoRA of some rows adds to; the latter two of the shared expert in a layer with experts.
enum LoraMatrix : int { kQkv, kOut, kGateUp, kDown, kLoraMatrices };

// Both in floats; `in` has no weight where an adapter leaves the matrix alone.
struct LoraUpdate {
    Linear in, out;
};

struct LoraLayer {
    LoraUpdate updates[kLoraMatrices];
};

// Consecutive rows of a forward that have an adapter.
struct LoraRun {
    int64_t start, stop;
    const LoraLayer* layers;
};

// The choice of experts, and their size.
struct Routing {
    int64_t experts, active, groups, active_groups;
    int64_t normalize;    // 0 or 1
    int64_t capacity;     // experts that a block may use, 0: any; then there is one group
    int64_t size, mixed;  // as `ffn` and `mixed` of a layer
    float scale;
};

struct Model {
    const Layer* layers;
    const float* final_norm;
    int64_t num_layers, hidden, heads, kv_heads, head_dim, rotary_dim;
    int64_t rank;  // of the updates; 0: there are none
    float eps;
    Routing routing;  // no experts: of a dense model
    int64_t lora_rank;  // the largest of the adapters in this forward, 0: there are none

    // That LoRA reads rows in.
    int lora_form() const { return lora_rank ? kFloats : 0; }
    int64_t attended() const { return heads * head_dim; }
    int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

// A row of gate and up values, off multiples of a page, where rows would share cache sets.
INLINE int64_t gate_up_stride(int64_t ffn) { return 2 * ffn + kLanes; }

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
    int64_t* touched;  // [layers], numbers of experts that rows have chosen; or null
    int64_t num_lora_runs;
    const LoraRun* lora_runs;
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
    // Rows in some forms.
    Rows take_rows(int64_t rows, int64_t width, int forms) {
        const int64_t stride = (width + 63) / 64 * 64 + 64;  // off powers of two, where rows would share cache sets
        Rows out = {};
        out.stride = stride;
        if (forms & kFloats) out.x = take<float>(rows * stride);
        if (forms & kByRow) out.q = take<Input>(rows * stride), out.scale = take<float>(rows), out.sum = take<int32_t>(rows);
        if (forms & kByGroup) out.group_q = take<GroupInput>(rows * stride), out.groups = take<InputGroup>(rows * stride / kGroup);
        return out;
    }
};
