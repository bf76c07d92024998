// The likeliest of a row of logits and its probability, chunk by chunk.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

struct Best {
    float peak, total;  // largest logit, and sum of exp(logit - peak)
    int64_t token;
};

INLINE Best best_of(const float* logits, int64_t count, int64_t first) {
    const float none = -std::numeric_limits<float>::infinity();
    Floats peak = splat(none);
    Ints at = {};
    for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
        const Floats x = load<Floats>(logits + i);
        at = select(x > peak, splat(int32_t(i)), at);
        peak = larger(peak, x);
    }
    Best best = {max_of(peak), 0, count};
    for (int64_t lane = 0; lane < kLanes; lane++)
        if (peak[lane] == best.peak) best.token = std::min<int64_t>(best.token, at[lane] + lane);
    const int64_t whole = count / kLanes * kLanes;
    for (int64_t i = whole; i < count; i++)
        if (logits[i] > best.peak) best.peak = logits[i], best.token = i;
    best.token += first;
    if (best.peak == none) return best;
    Floats total = {};
    for (int64_t i = 0; i < whole; i += kLanes) total += exp_(load<Floats>(logits + i) - best.peak);
    best.total = sum_of(total);
    for (int64_t i = whole; i < count; i++) best.total += exp_of(logits[i] - best.peak);
    return best;
}

static Best join(const Best& a, const Best& b) {
    if (b.peak == -std::numeric_limits<float>::infinity()) return a;
    const float peak = std::max(a.peak, b.peak);
    const float total = a.total * exp_of(a.peak - peak) + b.total * exp_of(b.peak - peak);
    return {peak, total, b.peak > a.peak ? b.token : a.token};
}
