// A merging optimizer's step over the blocks of a tensor.
#pragma once

#include "../merge_element.h"
#include "../sparse_tau.h"
#include "adam_block.h"
#include "masks.h"

namespace zokern {
namespace {

// Where the sparse elements from `element` on begin, if it is not negative.
struct TauCursor {
    int64_t element = -1, k = 0;
};

// Elements [i, i + n) of τ, most quickly where they follow on those of the last call.
void load_tau(const TauTensor& tau, int64_t i, int64_t n, float* values, TauCursor& cursor) {
    if (tau.values.data != nullptr && tau.starts == nullptr) {
        load_dense(tau.values, i, n, values);
        return;
    }
    zero(values, 0, n);
    if (tau.values.data == nullptr) return;
    while (n > 0) {
        const int64_t bucket = i / kBucket, first = bucket * kBucket, end = tau.starts[bucket + 1];
        const int64_t count = n < first + kBucket - i ? n : first + kBucket - i;
        int64_t k = cursor.k;
        if (cursor.element != i) k = find_place(tau, tau.starts[bucket], end, uint32_t(i - first));
        for (; k < end && first + tau.places[k] < i + count; ++k)
            values[first + tau.places[k] - i] = sparse_value(tau.values, k);
        i += count;
        values += count;
        n -= count;
        cursor = {i, k};
    }
}

struct MergeBlock {
    AdamBuffer first, second, deltas, taus, values, caches;
    // Where they begin in their buffers, for what is masked at random.
    float *delta, *tau;
    float* value;  // in the master or in the parameter itself where that is float32
};

// Takes 0 for what the masks do not keep.
template <Method method>
void mask(const MergeTensor& tensor, uint64_t seed, int64_t i, int64_t n, int64_t element,
          MergeBlock& b) {
    if constexpr (method == Method::ties || method == Method::ties_paper) {
        keep_by_threshold(tensor.mask, i, n, b.delta, b.delta);
    } else {
        const uint32_t draw = uint32_t(*tensor.mask.draw);
        drop_at_random(tensor.mask, seed, draw, element, n, b.delta);
        if constexpr (method == Method::dare_paper)
            drop_at_random(tensor.mask, seed, draw + kTauDraws, element, n, b.tau);
    }
}

// From the value at rest to the new one, where the step merges.
template <Method method>
void merge_values(const MergeTensor& tensor, uint64_t seed, int64_t i, int64_t n, int64_t element,
                  TauCursor& cursor, MergeBlock& b) {
    const AdamNumbers numbers = *tensor.adam.numbers;
    float *value = b.value, *cached = b.caches.t;
    load_tau(tensor.tau, i, n, b.tau, cursor);
    if (tensor.adam.cached != nullptr) {
        for (int64_t j = 0; j < n; ++j) b.delta[j] = b.delta[j] + cached[j];
    } else {
        zero(cached, 0, n);
    }
    if constexpr (method != Method::ema) mask<method>(tensor, seed, i, n, element, b);
    for (int64_t j = 0; j < n; ++j)
        value[j] = merged<method>(numbers, value[j], cached[j], b.tau[j], b.delta[j]);
    zero(cached, 0, n);
}

// Whether the mask keeps so little that Δ is better computed for those elements alone.
bool is_thin(const MergeTensor& tensor) {
    const AdamNumbers numbers = *tensor.adam.numbers;
    return *tensor.mask.limit <= int64_t(1) << 28 && tensor.adam.cached == nullptr &&
           *tensor.adam.merges && scaled_delta(numbers, 0.0f) == 0.0f;
}

// OnDARE's new values where the mask keeps little.
void merge_few(const MergeTensor& tensor, uint64_t seed, int64_t i, int64_t n, int64_t element,
               const float* first, const float* second, TauCursor& cursor, MergeBlock& b) {
    const AdamNumbers& numbers = *tensor.adam.numbers;
    uint32_t places[kAdamBlock + kBehindPlaces];
    float moved[kAdamBlock + kBehindPlaces];
    const Kept kept = find_kept(tensor.mask, seed, element, n, places);
    float* value = b.value;
    load_tau(tensor.tau, i, n, b.tau, cursor);
    for (int64_t k = kept.begin; k < kept.end; ++k) {
        const uint32_t j = places[k] - kept.lead;
        const float delta = scaled_delta(numbers, adam_delta(numbers, {first[j], second[j]}));
        moved[k] = value[j] + consensus<Method::dare>(numbers, b.tau[j], delta);
    }
    const float alpha = numbers.alpha, nothing = numbers.weight * 0.0f;
#pragma GCC ivdep
    for (int64_t j = 0; j < n; ++j) value[j] = value[j] + fma32(alpha, b.tau[j], nothing);
    for (int64_t k = kept.begin; k < kept.end; ++k) value[places[k] - kept.lead] = moved[k];
    if (numbers.decay == 0.0f) return;
    for (int64_t j = 0; j < n; ++j) value[j] = decayed(numbers, value[j]);
}

// Where a block's new moments can be computed: in the state itself if that is float32.
float* state_or(void* state, Storage type, int64_t i, AdamBuffer& buffer) {
    return type == Storage::fp32 ? static_cast<float*>(state) + i : buffer.t;
}

// Of a 16-bit type.
void* at_element(void* data, int64_t i) { return static_cast<uint16_t*>(data) + i; }

// Elements [i, i + n), the first of them `element` of the full tensor.
template <Method method, Storage storage>
void merge_block(const MergeTensor& tensor, uint64_t seed, int64_t i, int64_t n, int64_t element,
                 TauCursor& cursor) {
    const AdamTensor& adam = tensor.adam;
    MergeBlock b;
    b.delta = b.deltas.t + lead_of(element);
    b.tau = b.taus.t + lead_of(element);
    SweepTensor place{};
    place.param = tensor.param;
    place.residual = tensor.residual;
    const Storage first_type = adam.exp_avg.type, second_type = adam.exp_avg_sq.type;
    void* const firsts = const_cast<void*>(adam.exp_avg.data);
    void* const seconds = const_cast<void*>(adam.exp_avg_sq.data);
    float* first = state_or(firsts, first_type, i, b.first);
    float* second = state_or(seconds, second_type, i, b.second);
    exact_moments_block(adam, i, n, first, second);
    if (first == b.first.t) round_into(at_element(firsts, i), first_type, first, n);
    if (second == b.second.t) round_into(at_element(seconds, i), second_type, second, n);

    if (tensor.master != nullptr) {
        b.value = tensor.master + i;
    } else if (storage == Storage::fp32) {
        b.value = static_cast<float*>(tensor.param) + i;
    } else {
        b.value = b.values.t;
        load_block<storage>(place, i, n, b.value);
    }
    if (adam.cached != nullptr) memcpy(b.caches.t, adam.cached + i, size_t(n) * sizeof(float));
    if (method == Method::dare && is_thin(tensor)) {
        merge_few(tensor, seed, i, n, element, first, second, cursor, b);
    } else if (method == Method::ema || *adam.merges) {
        delta_block(adam, n, first, second, b.delta);
        merge_values<method>(tensor, seed, i, n, element, cursor, b);
    } else {
        delta_block(adam, n, first, second, b.delta);
        const AdamNumbers numbers = *adam.numbers;
        for (int64_t j = 0; j < n; ++j) {
            b.value[j] = decayed(numbers, b.value[j] + b.delta[j]);
            b.caches.t[j] = b.caches.t[j] + b.delta[j];
        }
    }
    if (adam.cached != nullptr)
        memcpy(const_cast<float*>(adam.cached) + i, b.caches.t, size_t(n) * sizeof(float));
    if (tensor.master != nullptr || storage != Storage::fp32)
        store_block<storage>(place, i, n, b.value);
}

template <Method method, Storage storage>
void merge_range(const MergeTensor& tensor, uint64_t seed, int64_t begin, int64_t end) {
    TauCursor cursor;
    over_rows(tensor.mask, begin, end, [&](int64_t i, int64_t n, int64_t element) {
        for (int64_t done = 0; done < n; done += kAdamBlock) {
            const int64_t count = n - done < kAdamBlock ? n - done : kAdamBlock;
            merge_block<method, storage>(tensor, seed, i + done, count, element + done, cursor);
        }
    });
}

template <Method method>
void merge_method(const MergeTensor& tensor, uint64_t seed, int64_t begin, int64_t end) {
    switch (tensor.storage) {
        case Storage::fp32:
            return merge_range<method, Storage::fp32>(tensor, seed, begin, end);
        case Storage::bf16:
            return merge_range<method, Storage::bf16>(tensor, seed, begin, end);
        case Storage::fp16:
            return merge_range<method, Storage::fp16>(tensor, seed, begin, end);
        case Storage::bf16_split16:
            return merge_range<method, Storage::bf16_split16>(tensor, seed, begin, end);
        case Storage::bf16_split8:
            return merge_range<method, Storage::bf16_split8>(tensor, seed, begin, end);
        case Storage::fp16_split:
            return merge_range<method, Storage::fp16_split>(tensor, seed, begin, end);
    }
}

void merge_step(Method method, uint64_t seed, const MergeTensor& tensor, int64_t begin,
                int64_t end) {
    switch (method) {
        case Method::dare:
            return merge_method<Method::dare>(tensor, seed, begin, end);
        case Method::dare_paper:
            return merge_method<Method::dare_paper>(tensor, seed, begin, end);
        case Method::ties:
            return merge_method<Method::ties>(tensor, seed, begin, end);
        case Method::ties_paper:
            return merge_method<Method::ties_paper>(tensor, seed, begin, end);
        case Method::ema:
            return merge_method<Method::ema>(tensor, seed, begin, end);
    }
}

}  // namespace
}  // namespace zokern
