// Forward pass of a transformer over packed weights, and its vocabulary head: the C ABI that `packed.py` calls.
//
// A layer is a few loops that threads share: over rows (norm, rotary, SwiGLU, rounding), over output channels (matrix
// products) and over (segment, kv head, rows) items (attention); experts.h has those of experts. No result depends on who computes what.
#include <atomic>
#include <new>

#include "attention.h"
#include "experts.h"
#include "gemm.h"
#include "head.h"
#include "lora.h"
#include "model.h"
#include "rows.h"

// Attention to one context that several threads share: how many of its parts are done, and their results.
constexpr int64_t kMaxParts = 512;

struct AttentionParts {
    std::atomic<int64_t>* done;  // [groups of parts], 0 between layers
    float* results;              // [kMaxParts] Partials
};

struct Workspace {
    float *qkv, *heads, *gate_up;
    float* low;  // noisy rows after the first matrix of gated LoRA
    Rows normed, attended, gated, lowered;
    const int64_t** slots;  // of each row's own key
    AttentionParts parts;
    ExpertWork experts;
    LoraWork lora;
    ThreadMemory memory;

    Workspace(const Model& m, int64_t rows, int threads, Arena& arena) : experts(m, rows, threads, arena), lora(m, rows, arena) {
        int64_t ffn = 0;
        int normed_forms = m.lora_form(), attended_forms = m.lora_form(), gated_forms = m.lora_form(), lowered_forms = 0;
        for (const Layer* l = m.layers; l < m.layers + m.num_layers; l++) {
            ffn = std::max(ffn, l->ffn);
            normed_forms |= l->qkv.forms() | l->feed_forms(), attended_forms |= l->out.forms(), gated_forms |= l->down.forms();
            lowered_forms |= l->qkv.out.form();
        }
        qkv = arena.take<float>(rows * m.qkv());
        heads = arena.take<float>(rows * m.attended());
        gate_up = arena.take<float>(rows * gate_up_stride(ffn));
        normed = arena.take_rows(rows, m.hidden, normed_forms);
        attended = arena.take_rows(rows, m.attended(), attended_forms);
        gated = arena.take_rows(rows, ffn, gated_forms);
        low = arena.take<float>(rows * m.rank);
        lowered = arena.take_rows(m.rank ? rows : 0, m.rank, lowered_forms);
        slots = arena.take<const int64_t*>(rows);
        parts.done = arena.take<std::atomic<int64_t>>(kMaxParts);
        parts.results = arena.take<float>(kMaxParts * Partial::floats(m.head_dim));
        memory.scratch_floats = std::max({m.hidden, ffn, m.routing.size, AttentionScratch::floats(m.head_dim)}) + kLanes;
        memory.scratch = arena.take<float>(threads * memory.scratch_floats);
    }
};

// One forward pass.
struct Forward {
    const Model& m;
    const ForwardBatch& step;
    const Workspace& work;
    const Team& team;
    const Lora lora = {m, step, work.lora, team};

    void run() const {
        prepare();
        for (int64_t layer = 0; layer < m.num_layers; layer++) {
            const Layer& l = m.layers[layer];
            normalize(l.attention_norm, l.qkv, l.qkv.forms());
            product(l.qkv, work.normed, {work.qkv, m.qkv()});
            lora.add(l, kQkv, l.qkv.base.panels(), work.normed, {work.qkv, m.qkv()});
            place_keys(l, layer);
            attend_all(layer);
            store(work.heads, m.attended(), work.attended, l.out);
            product(l.out, work.attended, {step.hidden, m.hidden, true});
            lora.add(l, kOut, l.out.base.panels(), work.attended, {step.hidden, m.hidden});
            normalize(l.mlp_norm, l.gate_up, l.feed_forms());
            if (l.experts) {
                RoutedLayer{m, l, step, work.experts, work.memory, team, lora, work.normed, work.gated, work.gate_up}.run();
                continue;
            }
            product(l.gate_up, work.normed, {work.gate_up, gate_up_stride(l.ffn)});
            lora.add(l, kGateUp, l.gate_up.base.panels(), work.normed, {work.gate_up, gate_up_stride(l.ffn)});
            gate(l);
            product(l.down, work.gated, {step.hidden, m.hidden, true});
            lora.add(l, kDown, l.down.base.panels(), work.gated, {step.hidden, m.hidden});
        }
        for (int64_t r = 0; r < step.rows; r++) {
            float* x = step.hidden + r * m.hidden;
            rms_norm(x, m.final_norm, m.hidden, m.eps, x);
        }
    }

    void prepare() const {
        for (int64_t i = 0; i < step.num_segments; i++) {
            const Segment& s = step.segments[i];
            for (int64_t r = s.start; r < s.stop; r++) work.slots[r] = s.slots + s.past + r - s.start;
        }
        for (int64_t i = 0; i < kMaxParts; i++) new (work.parts.done + i) std::atomic<int64_t>(0);
    }

    void product(const GatedLinear& w, const Rows& a, const Target& to) const {
        team.share(w.base.panels(), kPanelGrain, [&](Range panels, int) {
            gemm(w.base, a, {0, step.rows}, panels, to);
            for (int64_t i = 0; w.in.weight && i < step.num_segments; i++)
                if (const Segment& s = step.segments[i]; s.noisy)
                    gemm(w.out, work.lowered, {s.start, s.stop}, panels, {to.out, to.stride, true});
        });
    }

    // The first product of an update, over those of some rows that are noisy.
    void lower(const GatedLinear& w, const Rows& a, Range rows) const {
        for (int64_t i = 0; w.in.weight && i < step.num_segments; i++) {
            const Segment& s = step.segments[i];
            const Range own = {std::max(rows.from, s.start), std::min(rows.to, s.stop)};
            if (!s.noisy || own.from >= own.to) continue;
            gemm(w.in, a, own, {0, w.in.panels()}, {work.low, m.rank});
            for (int64_t r = own.from; r < own.to; r++)
                store_row(work.low + r * m.rank, m.rank, work.lowered, r, w.out.form());
        }
    }

    void normalize(const float* weight, const GatedLinear& next, int forms) const {
        team.share(step.rows, kRowGrain, [&](Range rows, int thread) {
            float* scratch = work.memory.scratch_of(thread);
            for (int64_t r = rows.from; r < rows.to; r++) {
                rms_norm(step.hidden + r * m.hidden, weight, m.hidden, m.eps, scratch);
                store_row(scratch, m.hidden, work.normed, r, forms | m.lora_form());
            }
            lower(next, work.normed, rows);
        }, kFewRows);
    }

    void store(const float* x, int64_t width, const Rows& to, const GatedLinear& next) const {
        team.share(step.rows, kRowGrain, [&](Range rows, int) {
            for (int64_t r = rows.from; r < rows.to; r++) store_row(x + r * width, width, to, r, next.forms() | m.lora_form());
            lower(next, to, rows);
        }, kFewRows);
    }

    void gate(const Layer& l) const {
        team.share(step.rows, kRowGrain, [&](Range rows, int thread) {
            float* scratch = work.memory.scratch_of(thread);
            for (int64_t r = rows.from; r < rows.to; r++) {
                swiglu(work.gate_up + r * gate_up_stride(l.ffn), l.ffn, scratch);
                mix(scratch, l.ffn, l.mixed);
                store_row(scratch, l.ffn, work.gated, r, l.down.forms() | m.lora_form());
            }
            lower(l.down, work.gated, rows);
        }, kFewGates);
    }

    float* stored(int64_t layer, int64_t value, int64_t head) const {
        return step.kv_cache.data + ((layer * 2 + value) * m.kv_heads + head) * step.kv_cache.slots * m.head_dim;
    }

    // Norms and rotates queries and keys, and writes keys and values to their slots.
    void place_keys(const Layer& l, int64_t layer) const {
        team.share(step.rows, kRowGrain, [&](Range rows, int) {
            for (int64_t r = rows.from; r < rows.to; r++) place_keys_of(r, l, layer);
        }, kFewRows);
    }

    void place_keys_of(int64_t row, const Layer& l, int64_t layer) const {
        float* head = work.qkv + row * m.qkv();
        for (int64_t h = 0; h < m.heads + m.kv_heads; h++, head += m.head_dim) {
            if (l.query_norm) rms_norm(head, h < m.heads ? l.query_norm : l.key_norm, m.head_dim, m.eps, head);
            rotate(head, step.cos + row * m.rotary_dim, step.sin + row * m.rotary_dim, m.rotary_dim);
        }
        const float* keys = head - m.kv_heads * m.head_dim;
        for (int64_t h = 0; h < 2 * m.kv_heads; h++)
            memcpy(stored(layer, h / m.kv_heads, h % m.kv_heads) + *work.slots[row] * m.head_dim, keys + h * m.head_dim,
                   m.head_dim * sizeof(float));
    }

    // How attention is shared out: lanes of a segment and a kv head, and a part of the keys each where those are too few items.
    struct Sharing {
        int64_t lanes;
        bool by_parts;
        int64_t items = 0;
    };

    // Calls f(segment, kv head, from, to, parts) for every group of lanes.
    template <class F>
    void each_group(const Sharing& sharing, F f) const {
        const int64_t heads = m.heads / m.kv_heads;
        for (int64_t i = 0; i < step.num_segments; i++) {
            const Segment& s = step.segments[i];
            const int64_t count = (s.stop - s.start) * heads;
            for (int64_t g = 0; g < m.kv_heads; g++)
                for (int64_t from = 0; from < count; from += sharing.lanes) {
                    const int64_t to = std::min(from + sharing.lanes, count);
                    f(s, g, from, to, sharing.by_parts ? chunks_of(s.visible((to - 1) / heads)) : 1);
                }
        }
    }

    Sharing share_attention() const {
        const int64_t wanted = 3 * team.threads(), each = (step.rows * m.heads + wanted - 1) / wanted;
        Sharing sharing = {std::min((each + kNative - 1) / kNative * kNative, kQueryLanes), true};
        int64_t groups = 0;
        each_group(sharing, [&](const Segment&, int64_t, int64_t, int64_t, int64_t parts) { groups++, sharing.items += parts; });
        if (team.threads() == 1 || groups >= wanted || sharing.items > kMaxParts) sharing = {sharing.lanes, false, groups};
        return sharing;
    }

    void attend_all(int64_t layer) const {
        const Sharing sharing = share_attention();
        team.share(sharing.items, 1, [&](Range range, int thread) {
            const AttentionScratch buffers(work.memory.scratch_of(thread), m.head_dim);
            int64_t first = 0, group = 0;
            each_group(sharing, [&](const Segment& s, int64_t g, int64_t from, int64_t to, int64_t parts) {
                const int64_t heads = m.heads / m.kv_heads, at = g * heads * m.head_dim;
                const HeadCache head = {stored(layer, 0, g), stored(layer, 1, g)};
                const Queries queries = {work.qkv + at, work.heads + at, m.qkv(), m.attended(), heads, m.head_dim, from, to};
                const Lanes lanes{s, head, queries, buffers};
                for (int64_t item = std::max(range.from, first); item < std::min(range.to, first + parts); item++) {
                    if (parts == 1) lanes.attend();
                    else attend_part(lanes, first, parts, item - first, group);
                }
                first += parts, group++;
            });
        });
    }

    // One chunk of keys; who finishes the last one joins them in order.
    void attend_part(const Lanes& lanes, int64_t first, int64_t count, int64_t chunk, int64_t group) const {
        const int64_t floats = Partial::floats(m.head_dim);
        float* results = work.parts.results + first * floats;
        lanes.read_queries();
        lanes.attend_chunk(chunk, Partial(results + chunk * floats));
        if (work.parts.done[group].fetch_add(1, std::memory_order_acq_rel) + 1 < count) return;
        work.parts.done[group].store(0, std::memory_order_relaxed);
        memcpy(lanes.s.sum.peak, results, floats * sizeof(float));
        for (int64_t c = 1; c < count; c++) join(lanes.s.sum, Partial(results + c * floats), lanes.count, m.head_dim);
        lanes.write();
    }
};

// The vocabulary in chunks: each is scored into a buffer, then reduced, and chunks are joined in order.
constexpr int64_t kChunkPanels = 48, kChunk = kChunkPanels * kLanes, kHeadRows = 64;

struct LinearWorkspace {
    Rows rows;
    Best* best;  // [chunk][row]
    float* scratch;
    int64_t chunks;
    int form;

    LinearWorkspace(const Linear& w, int64_t count, int threads, Arena& arena) {
        chunks = (w.panels() + kChunkPanels - 1) / kChunkPanels;
        form = w.form();
        rows = arena.take_rows(count, w.depth, form);
        best = arena.take<Best>(chunks * count);
        scratch = arena.take<float>(threads * kHeadRows * kChunk);
    }

    void store(const float* x, int64_t count, int64_t width, const Team& team) const {
        team.share(count, kRowGrain, [&](Range range, int) {
            for (int64_t r = range.from; r < range.to; r++) store_row(x + r * width, width, rows, r, form);
        }, kFewRows);
    }
};

#pragma GCC visibility push(default)
extern "C" {

int64_t unmask_forward_bytes(const Model* model, int64_t rows, int threads) {
    Arena arena{nullptr};
    Workspace(*model, rows, threads, arena);
    return arena.used;
}

void unmask_forward(const Model* model, const ForwardBatch* step, void* buffer, int threads) {
    Arena arena{static_cast<char*>(buffer)};
    const Workspace work(*model, step->rows, threads, arena);
    const Team team(threads);
    Forward{*model, *step, work, team}.run();
}

int64_t unmask_route_bytes(const Routing* routing, int64_t rows, int threads) {
    Arena arena{nullptr};
    RouterWork(*routing, rows, threads, arena);
    return arena.used;
}

// Experts of rows and their weights, each [rows][active], by logits; of `step` only rows and segments are read.
void unmask_route(const Routing* routing, const float* bias, const float* logits, const ForwardBatch* step, int64_t* choice,
                  float* weights, void* buffer, int threads) {
    Arena arena{static_cast<char*>(buffer)};
    const RouterWork work(*routing, step->rows, threads, arena);
    memcpy(work.scores, logits, step->rows * routing->experts * sizeof(float));
    route(*routing, bias, work, *step, Team(threads));
    memcpy(choice, work.choice, step->rows * routing->active * sizeof(int64_t));
    for (int64_t row = 0; row < step->rows; row++)
        memcpy(weights + row * routing->active, work.weights + row * (routing->active + routing->groups),
               routing->active * sizeof(float));
}

int64_t unmask_linear_bytes(const Linear* w, int64_t count, int threads) {
    Arena arena{nullptr};
    LinearWorkspace(*w, count, threads, arena);
    return arena.used;
}

// Products [count][outputs] of rows [count][width].
void unmask_linear(const Linear* w, const float* x, int64_t count, int64_t width, float* out, void* buffer, int threads) {
    Arena arena{static_cast<char*>(buffer)};
    const LinearWorkspace work(*w, count, threads, arena);
    const Team team(threads);
    work.store(x, count, width, team);
    team.share(w->panels(), kPanelGrain, [&](Range panels, int) {
        gemm(*w, work.rows, {0, count}, panels, {out, w->outputs});
    });
}

// The likeliest token of each row but `banned` (none: outputs), the lowest of equals, and its probability.
void unmask_greedy(const Linear* head, const float* hidden, int64_t count, int64_t width, int64_t banned, int64_t* tokens,
                   float* probabilities, void* buffer, int threads) {
    Arena arena{static_cast<char*>(buffer)};
    const LinearWorkspace work(*head, count, threads, arena);
    const Team team(threads);
    work.store(hidden, count, width, team);
    team.share(work.chunks, 1, [&](Range chunks, int thread) {
        float* logits = work.scratch + thread * kHeadRows * kChunk;
        for (int64_t chunk = chunks.from; chunk < chunks.to; chunk++) {
            const int64_t first = chunk * kChunk, size = std::min(kChunk, head->outputs - first);
            const Range panels = {chunk * kChunkPanels, std::min((chunk + 1) * kChunkPanels, head->panels())};
            for (int64_t from = 0; from < count; from += kHeadRows) {
                const int64_t to = std::min(from + kHeadRows, count);
                gemm(*head, work.rows, {from, to}, panels, {logits - from * kChunk, kChunk, false, first});
                for (int64_t r = from; r < to; r++) {
                    float* row = logits + (r - from) * kChunk;
                    if (banned >= first && banned < first + size) row[banned - first] = -std::numeric_limits<float>::infinity();
                    work.best[chunk * count + r] = best_of(row, size, first);
                }
            }
        }
    });
    for (int64_t r = 0; r < count; r++) {
        Best best = work.best[r];
        for (int64_t chunk = 1; chunk < work.chunks; chunk++) best = join(best, work.best[chunk * count + r]);
        tokens[r] = best.token;
        probabilities[r] = 1.0f / best.total;
    }
}
}
#pragma GCC visibility pop
