// Adam's Δ over blocks that stay in the L1 cache.
#pragma once

#include "../adam.h"
#include "../merging.h"
#include "dense.h"

namespace zokern {
namespace {

// So short that the processor works on several blocks at once: divisions and square roots of one
// run beside the loads and the random words of the next.
constexpr int64_t kAdamBlock = 128;

// With room for whole vectors, and for the elements of a group before the first.
struct alignas(64) AdamBuffer {
    float t[kAdamBlock + 64];
};

// The new moments of elements [i, i + n), n ≤ kAdamBlock, not yet rounded to the type of the state.
// They may be written where they were read.
void exact_moments_block(const AdamTensor& adam, int64_t i, int64_t n, float* first,
                         float* second) {
    AdamBuffer grads, firsts, seconds;
    const float* g = floats_of(adam.grad, i, n, grads.t);
    const float* m = floats_of(adam.exp_avg, i, n, firsts.t);
    const float* v = floats_of(adam.exp_avg_sq, i, n, seconds.t);
    const AdamNumbers numbers = *adam.numbers;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
        const Moments moments = next_moments(numbers, g[j], {m[j], v[j]});
        first[j] = moments.first;
        second[j] = moments.second;
    }
}

// Rounded to it.
void moments_block(const AdamTensor& adam, int64_t i, int64_t n, float* first, float* second) {
    exact_moments_block(adam, i, n, first, second);
    round_to(adam.exp_avg.type, first, n);
    round_to(adam.exp_avg_sq.type, second, n);
}

// Δ of new moments, without what is cached.
void delta_block(const AdamTensor& adam, int64_t n, const float* first, const float* second,
                 float* delta) {
    const AdamNumbers numbers = *adam.numbers;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) delta[j] = adam_delta(numbers, {first[j], second[j]});
}

// Δ with what is cached, where the step merges.
void load_adam_delta(const AdamTensor& adam, int64_t i, int64_t n, float* delta) {
    AdamBuffer first, second;
    for (int64_t done = 0; done < n; done += kAdamBlock) {
        const int64_t count = n - done < kAdamBlock ? n - done : kAdamBlock;
        moments_block(adam, i + done, count, first.t, second.t);
        delta_block(adam, count, first.t, second.t, delta + done);
    }
    if (adam.cached == nullptr || *adam.merges == 0) return;
    for (int64_t j = 0; j < n; ++j) delta[j] = delta[j] + adam.cached[i + j];
}

}  // namespace
}  // namespace zokern
