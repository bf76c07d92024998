// Routed experts: the choice of each row's experts, and their products.
//
// The choice is that of `arch.moe.route`, the lowest of equals included. Rows are copied together by expert, so that the weights of
// an expert are read once for all of its rows; what a row's experts give is added up in the order of its choice.
#pragma once

#include <algorithm>
#include <limits>

#include "gemm.h"
#include "lora.h"
#include "model.h"
#include "rows.h"

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// e^x, |x| <= 700, to about one unit in the last place: rounded to float it is the same number as anybody's.
static inline double exp_of(double x) {
    const double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, in the low mantissa bits
    const double shifted = x * 1.4426950408889634 + magic, n = shifted - magic;
    const double r = x - n * 0.6931471803691238 - n * 1.9082149292705877e-10;
    double p = 1.0 / 6227020800.0;
    for (double c : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0})
        p = p * r + 1.0 / c;
    uint64_t bits;
    memcpy(&bits, &shifted, 8);
    bits = (bits + 1023) << 52;
    double power;
    memcpy(&power, &bits, 8);
    return p * power;
}

static inline float sigmoid_of(float x) { return float(1.0 / (1.0 + exp_of(std::min(std::max(-double(x), -700.0), 700.0)))); }

// Numbers that are ordered as floats are, and as their indices where those are equal, the lower index first.
static inline void keys_of(const float* x, int64_t size, int64_t* keys) {
    for (int64_t i = 0; i < size; i++) {
        const float value = x[i] + 0.0f;  // not -0
        int32_t bits;
        memcpy(&bits, &value, 4);
        keys[i] = int64_t(bits ^ (bits >> 31 & 0x7fffffff)) * (int64_t(1) << 32) + (size - 1 - i);
    }
}

// Index of the largest key, which is then used up.
static inline int64_t take_largest(int64_t* keys, int64_t size) {
    int64_t best = keys[0];
    for (int64_t i = 1; i < size; i++) best = std::max(best, keys[i]);
    const int64_t index = size - 1 - (best & 0xffffffff);
    keys[index] = INT64_MIN;
    return index;
}

// Experts of one row: `biased` is used up, `keys` are memory for as many numbers as there are experts.
static void choose(const Routing& r, const float* scores, float* biased, int64_t* keys, int64_t* choice, float* weights) {
    if (r.active_groups < r.groups) {
        const int64_t size = r.experts / r.groups;
        float* group_scores = weights + r.active;  // there is room for them behind the weights
        for (int64_t g = 0; g < r.groups; g++) {
            float first = kMinusInfinity, second = kMinusInfinity;
            for (int64_t j = g * size; j < (g + 1) * size; j++) {
                second = std::max(second, std::min(first, biased[j]));
                first = std::max(first, biased[j]);
            }
            group_scores[g] = size > 1 ? first + second : first;
        }
        keys_of(group_scores, r.groups, keys);
        for (int64_t i = 0; i < r.active_groups; i++) take_largest(keys, r.groups);
        for (int64_t g = 0; g < r.groups; g++)
            if (keys[g] != INT64_MIN)
                std::fill(biased + g * size, biased + (g + 1) * size, kMinusInfinity);
    }
    keys_of(biased, r.experts, keys);
    float total = 0;
    for (int64_t i = 0; i < r.active; i++) {
        choice[i] = take_largest(keys, r.experts);
        weights[i] = scores[choice[i]];
        total += weights[i];
    }
    for (int64_t i = 0; i < r.active; i++) weights[i] = (r.normalize ? weights[i] / (total + 1e-20f) : weights[i]) * r.scale;
}

// Bars rows of one block from all experts but those with the largest scores in any of them; `limits` are memory for the experts.
static void admit(const Routing& r, float* biased, int64_t rows, int64_t* keys, float* limits) {
    if (rows == 1) return;  // its experts are among those
    memcpy(limits, biased, r.experts * sizeof(float));
    for (int64_t i = 1; i < rows; i++)
        for (int64_t j = 0; j < r.experts; j++) limits[j] = std::max(limits[j], biased[i * r.experts + j]);
    keys_of(limits, r.experts, keys);
    for (int64_t i = 0; i < r.capacity; i++) take_largest(keys, r.experts);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < r.experts; j++)
            if (keys[j] != INT64_MIN) biased[i * r.experts + j] = kMinusInfinity;
}

struct RouterWork {
    float *scores, *biased;  // [rows][experts]; the scores are logits on entry
    float* limits;           // [threads][experts]
    int64_t* keys;           // likewise
    int64_t* choice;         // [rows][active]
    float* weights;          // [rows][active + groups], the latter are scratch

    RouterWork(const Routing& r, int64_t rows, int threads, Arena& arena) {
        scores = arena.take<float>(rows * r.experts), biased = arena.take<float>(rows * r.experts);
        limits = arena.take<float>(threads * r.experts), keys = arena.take<int64_t>(threads * r.experts);
        choice = arena.take<int64_t>(rows * r.active), weights = arena.take<float>(rows * (r.active + r.groups));
    }
};

// The experts of all rows and their weights, from the logits in `work.scores`.
static void route(const Routing& r, const float* bias, const RouterWork& work, const ForwardBatch& step, const Team& team) {
    team.share(step.rows, kRowGrain, [&](Range rows, int) {
        for (int64_t i = rows.from * r.experts; i < rows.to * r.experts; i++) {
            work.scores[i] = sigmoid_of(work.scores[i]);
            work.biased[i] = work.scores[i] + bias[i % r.experts];
        }
    });
    if (r.capacity)
        team.share(step.num_segments, 1, [&](Range segments, int thread) {
            for (const Segment* s = step.segments + segments.from; s < step.segments + segments.to; s++)
                for (int64_t row = s->start, stop; row < s->stop; row = stop) {
                    stop = std::min(row + s->block_size - (s->past + row - s->start) % s->block_size, s->stop);
                    admit(r, work.biased + row * r.experts, stop - row, work.keys + thread * r.experts,
                          work.limits + thread * r.experts);
                }
        });
    team.share(step.rows, kRowGrain, [&](Range rows, int thread) {
        for (int64_t i = rows.from; i < rows.to; i++)
            choose(r, work.scores + i * r.experts, work.biased + i * r.experts, work.keys + thread * r.experts,
                   work.choice + i * r.active, work.weights + i * (r.active + r.groups));
    });
}

// An expert that rows have chosen, and where they are among the pairs of rows and experts, in order of experts.
struct Touched {
    int64_t expert, from, to;
};

struct ExpertWork {
    RouterWork router;
    int64_t *pair, *row;  // [rows][active]: where a row and this expert are among the pairs; and the row of a pair
    int64_t* ends;        // [experts]
    Touched* touched;
    Rows pairs, gated;
    float *gate_up, *out;

    ExpertWork(const Model& m, int64_t rows, int threads, Arena& arena) : router(m.routing, rows, threads, arena) {
        const int64_t experts = m.routing.experts, size = m.routing.size, count = rows * m.routing.active;
        pair = arena.take<int64_t>(count), row = arena.take<int64_t>(count), ends = arena.take<int64_t>(experts);
        touched = arena.take<Touched>(std::min(experts, count));
        int pair_forms = 0, gated_forms = 0;
        for (const Layer* l = m.layers; l < m.layers + m.num_layers; l++)
            if (l->experts) pair_forms |= l->experts->gate_up.form(), gated_forms |= l->experts->down.form();
        pairs = arena.take_rows(count, m.hidden, pair_forms), gated = arena.take_rows(count, size, gated_forms);
        gate_up = arena.take<float>(count * gate_up_stride(size)), out = arena.take<float>(count * m.hidden);
    }
};

// Memory of each thread.
struct ThreadMemory {
    float* scratch;
    int64_t scratch_floats;

    float* scratch_of(int thread) const { return scratch + thread * scratch_floats; }
};

// The feed-forward of a layer with experts, shared and routed, over rows that are normed; adds to the hidden states.
struct RoutedLayer {
    const Model& m;
    const Layer& l;
    const ForwardBatch& step;
    const ExpertWork& work;
    const ThreadMemory& memory;
    const Team& team;
    const Lora& lora;
    const Rows &normed, &shared_gated;
    float* shared_gate_up;
    const Routing& r = m.routing;

    void run() const {
        team.share(l.experts->router.panels(), kPanelGrain, [&](Range panels, int) {
            gemm(l.experts->router, normed, {0, step.rows}, panels, {work.router.scores, r.experts});
        });
        route(r, l.experts->bias, work.router, step, team);
        const int64_t num_touched = sort_pairs();
        if (step.touched) step.touched[&l - m.layers] = num_touched;
        team.share(num_pairs(), kRowGrain, [&](Range pairs, int) {
            for (int64_t p = pairs.from; p < pairs.to; p++) copy_row(normed, work.row[p], work.pairs, p, l.experts->gate_up.form());
        });
        products(l.gate_up.base, l.experts->gate_up, 2 * r.size, num_touched, normed, work.pairs,
                 {shared_gate_up, gate_up_stride(l.ffn)}, {work.gate_up, gate_up_stride(r.size)});
        lora.add(l, kGateUp, l.gate_up.base.panels(), normed, {shared_gate_up, gate_up_stride(l.ffn)});
        gate();
        products(l.down.base, l.experts->down, m.hidden, num_touched, shared_gated, work.gated, {step.hidden, m.hidden, true},
                 {work.out, m.hidden});
        lora.add(l, kDown, l.down.base.panels(), shared_gated, {step.hidden, m.hidden});
        team.share(step.rows, kRowGrain, [&](Range rows, int) {
            for (int64_t row = rows.from; row < rows.to; row++) combine(row);
        });
    }

    int64_t num_pairs() const { return step.rows * r.active; }

    // Orders pairs by expert, and says how many experts there are among them.
    int64_t sort_pairs() const {
        std::fill(work.ends, work.ends + r.experts, 0);
        for (int64_t i = 0; i < num_pairs(); i++) work.ends[work.router.choice[i]]++;
        int64_t num_touched = 0, end = 0;
        for (int64_t e = 0; e < r.experts; e++) {
            const int64_t from = end;
            end += work.ends[e];
            work.ends[e] = from;
            if (end > from) work.touched[num_touched++] = {e, from, end};
        }
        for (int64_t i = 0; i < num_pairs(); i++) {
            work.pair[i] = work.ends[work.router.choice[i]]++;
            work.row[work.pair[i]] = i / r.active;
        }
        return num_touched;
    }

    // Products of all rows with the shared expert and of pairs with their experts, shared out by panels.
    void products(const Linear& shared, const Linear& stack, int64_t outputs, int64_t num_touched, const Rows& rows,
                  const Rows& pairs, const Target& shared_to, const Target& to) const {
        const int64_t first = l.ffn ? shared.panels() : 0, each = stack.part(0, outputs).panels();
        team.share(first + num_touched * each, kPanelGrain, [&](Range panels, int) {
            if (panels.from < first) gemm(shared, rows, {0, step.rows}, {panels.from, std::min(panels.to, first)}, shared_to);
            for (int64_t panel = std::max(panels.from, first), count; panel < panels.to; panel += count) {
                const Touched& t = work.touched[(panel - first) / each];
                const int64_t from = (panel - first) % each;
                count = std::min(each - from, panels.to - panel);
                gemm(stack.part(t.expert, outputs), pairs, {t.from, t.to}, {from, from + count}, to);
            }
        });
    }

    void gate() const {
        const int64_t shared_rows = l.ffn ? step.rows : 0;
        team.share(shared_rows + num_pairs(), kRowGrain, [&](Range range, int thread) {
            float* scratch = memory.scratch_of(thread);
            for (int64_t i = range.from; i < range.to; i++) {
                const bool is_shared = i < shared_rows;
                const int64_t row = is_shared ? i : i - shared_rows, size = is_shared ? l.ffn : r.size;
                swiglu((is_shared ? shared_gate_up : work.gate_up) + row * gate_up_stride(size), size, scratch);
                mix(scratch, size, is_shared ? l.mixed : r.mixed);
                if (is_shared) store_row(scratch, size, shared_gated, row, l.down.forms() | m.lora_form());
                else store_row(scratch, size, work.gated, row, l.experts->down.form());
            }
        });
    }

    void combine(int64_t row) const {
        const int64_t* pair = work.pair + row * r.active;
        const float* weights = work.router.weights + row * (r.active + r.groups);
        float* hidden = step.hidden + row * m.hidden;
        for (int64_t i = 0; i < m.hidden; i += kLanes) {
            const int count = lanes_left(i, m.hidden);
            Floats sum = {};
            for (int64_t k = 0; k < r.active; k++) sum = fma(splat(weights[k]), load_some(work.out + pair[k] * m.hidden + i, count), sum);
            store_some(hidden + i, load_some(hidden + i, count) + sum, count);
        }
    }
};
