// Adam's Δ over blocks that stay in the L1 cache.
//
// The including file has defined load_block and store_block<storage>.
#pragma once

#include "../adam.h"
#include "../merging.h"
#include "driver.h"

namespace zokern {
namespace {

// So short that the processor works on several blocks at once: divisions and square roots of one
// run beside the loads and the random words of the next.
constexpr int64_t kAdamBlock = 128;

struct alignas(64) AdamBuffer {
    float t[kAdamBlock + 64];
};

// Elements [i, i + n), where they are if they are float32, else decoded in the buffer.
const float* view(const DenseTensor& dense, int64_t i, int64_t n, AdamBuffer& buffer) {
    if (dense.type == Storage::fp32) return static_cast<const float*>(dense.data) + i;
    load_dense(dense, i, n, buffer.t);
    return buffer.t;
}

template <Storage storage>
void store_dense_as(void* data, int64_t i, int64_t n, const float* values) {
    SweepTensor as_param{};
    as_param.param = data;
    store_block<storage>(as_param, i, n, values);
}

void store_dense(void* data, Storage type, int64_t i, int64_t n, const float* values) {
    switch (type) {
        case Storage::bf16:
            return store_dense_as<Storage::bf16>(data, i, n, values);
        case Storage::fp16:
            return store_dense_as<Storage::fp16>(data, i, n, values);
        default:
            memcpy(static_cast<float*>(data) + i, values, size_t(n) * sizeof(float));
    }
}

// Rounds values as storing them in a tensor of that type would.
void round_to(Storage type, int64_t n, float* values) {
    if (type == Storage::fp32) return;
    alignas(64) unsigned char stored[2 * (kAdamBlock + 64)];
    store_dense(stored, type, 0, n, values);
    load_dense({stored, type}, 0, n, values);
}

// The new moments, rounded to the type of the state, and Δ without what is cached, of elements
// [i, i + n). The moments may be written where they were read.
void adam_block(const AdamTensor& a, int64_t i, int64_t n, float* first, float* second,
                float* delta) {
    AdamBuffer grads, firsts, seconds;
    const float* g = view(a.grad, i, n, grads);
    const float* m = view(a.exp_avg, i, n, firsts);
    const float* v = view(a.exp_avg_sq, i, n, seconds);
    const AdamNumbers numbers = *a.numbers;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) {
        const Moments moments = next_moments(numbers, g[j], {m[j], v[j]});
        first[j] = moments.first;
        second[j] = moments.second;
    }
    round_to(a.exp_avg.type, n, first);
    round_to(a.exp_avg_sq.type, n, second);
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) delta[j] = adam_delta(numbers, {first[j], second[j]});
}

// Where a block's new moments can be computed: in the state itself if that is float32.
float* state_or(void* state, Storage type, int64_t i, AdamBuffer& buffer) {
    return type == Storage::fp32 ? static_cast<float*>(state) + i : buffer.t;
}

}  // namespace
}  // namespace zokern
