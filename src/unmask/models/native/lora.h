// LoRA of some rows: low-rank updates in floats, added to what a layer's matrices give. All other rows are left alone.
#pragma once

#include "gemm.h"
#include "model.h"

struct LoraWork {
    Rows lowered;  // rows after the first matrix of an update

    LoraWork(const Model& m, int64_t rows, Arena& arena) {
        lowered = arena.take_rows(m.lora_rank ? rows : 0, m.lora_rank, m.lora_form());
    }
};

struct Lora {
    const Model& m;
    const ForwardBatch& step;
    const LoraWork& work;
    const Team& team;

    // Adds the updates of a layer's matrix, which has so many panels, to its product with rows that are there in floats.
    void add(const Layer& l, LoraMatrix which, int64_t panels, const Rows& a, const Target& to) const {
        bool any = false;
        each_run(l, which, [&](const LoraRun&, const LoraUpdate&) { any = true; });
        if (!any) return;
        const Rows& low = work.lowered;
        team.share(step.rows, kRowGrain, [&](Range rows, int) {
            each_run(l, which, [&](const LoraRun& run, const LoraUpdate& update) {
                const Range own = {std::max(rows.from, run.start), std::min(rows.to, run.stop)};
                if (own.from >= own.to) return;
                gemm(update.in, a, own, {0, update.in.panels()}, {low.x, low.stride});
                const int64_t rank = update.in.outputs;
                for (int64_t r = own.from; r < own.to; r++)
                    std::fill(low.x + r * low.stride + rank, low.x + r * low.stride + update.out.depth, 0.0f);
            });
        });
        team.share(panels, kPanelGrain, [&](Range range, int) {
            each_run(l, which, [&](const LoraRun& run, const LoraUpdate& update) {
                gemm(update.out, low, {run.start, run.stop}, range, {to.out, to.stride, true});
            });
        });
    }

  private:
    template <class F>
    void each_run(const Layer& l, LoraMatrix which, F f) const {
        for (int64_t i = 0; i < step.num_lora_runs; i++) {
            const LoraRun& run = step.lora_runs[i];
            const LoraUpdate& update = run.layers[&l - m.layers].updates[which];
            if (update.in.weight) f(run, update);
        }
    }
};
