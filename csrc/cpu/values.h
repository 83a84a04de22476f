// Blocks of the values whose magnitudes are looked at, and of those that a mask keeps.
#pragma once

#include "../magnitudes.h"
#include "driver.h"

namespace zokern {
namespace {

// Where float32 elements [i, i + n) are, the buffer where they are converted.
const float* floats_of(const DenseTensor& dense, int64_t i, int64_t n, float* buffer) {
    if (dense.type == Storage::fp32) return static_cast<const float*>(dense.data) + i;
    load_dense(dense, i, n, buffer);
    return buffer;
}

template <Storage storage>
void round_block(float* values, int64_t n) {
    uint16_t rounded[kBlock];
    SweepTensor as_param{};
    as_param.param = rounded;
    store_block<storage>(as_param, 0, n, values);
    load_block<storage>(as_param, 0, n, values);
}

// At most kBlock values, rounded to a type and back.
void round_to(Storage type, float* values, int64_t n) {
    if (type == Storage::bf16) round_block<Storage::bf16>(values, n);
    if (type == Storage::fp16) round_block<Storage::fp16>(values, n);
}

// So many at a time that all the operands of a step stay in the L1 cache.
constexpr int64_t kSteps = 512;

void load_few_steps(const AdamTensor& adam, int64_t i, int64_t n, float* values) {
    float grads[kSteps], firsts[kSteps], seconds[kSteps], next_seconds[kSteps];
    const AdamNumbers numbers = *adam.numbers;
    const float* grad = floats_of(adam.grad, i, n, grads);
    const float* first = floats_of(adam.exp_avg, i, n, firsts);
    const float* second = floats_of(adam.exp_avg_sq, i, n, seconds);
    for (int64_t j = 0; j < n; ++j) {
        const Moments next = next_moments(numbers, grad[j], {first[j], second[j]});
        values[j] = next.first;
        next_seconds[j] = next.second;
    }
    round_to(adam.exp_avg.type, values, n);
    round_to(adam.exp_avg_sq.type, next_seconds, n);
    for (int64_t j = 0; j < n; ++j) values[j] = adam_delta(numbers, {values[j], next_seconds[j]});
    if (adam.cached != nullptr && *adam.merges != 0) {
        for (int64_t j = 0; j < n; ++j) values[j] += adam.cached[i + j];
    }
}

void load_steps(const AdamTensor& adam, int64_t i, int64_t n, float* values) {
    for (int64_t j = 0; j < n; j += kSteps)
        load_few_steps(adam, i + j, n - j < kSteps ? n - j : kSteps, values + j);
}

// Where values [i, i + n) are, n ≤ kBlock: in the tensor itself or in the buffer.
const float* values_of(const ValueTensor& tensor, int64_t i, int64_t n, float* buffer) {
    if (tensor.adam.grad.data != nullptr) {
        load_steps(tensor.adam, i, n, buffer);
        return buffer;
    }
    const float* values = floats_of(tensor.tensor, i, n, buffer);
    if (tensor.base.data == nullptr) return values;
    Buffer bases;
    const float* base = floats_of(tensor.base, i, n, bases.t);
    for (int64_t j = 0; j < n; ++j) buffer[j] = values[j] - base[j];
    if (tensor.rounded) round_to(tensor.tensor.type, buffer, n);
    return buffer;
}

void keep_by_threshold(const MaskTensor& mask, int64_t i, int64_t n, const float* values,
                       float* kept) {
    const uint32_t threshold = magnitude(*mask.threshold);
    const int64_t below_cut = *mask.cut - i;
    const int32_t ties = int32_t(below_cut < 0 ? 0 : below_cut < n ? below_cut : n);
    for (int32_t j = 0; j < int32_t(n); ++j) {
        const uint32_t m = magnitude(values[j]);
        const bool keep = (m > threshold) | ((m == threshold) & (j < ties));
        kept[j] = keep ? values[j] : 0.0f;
    }
}

void keep_at_random(const MaskTensor& mask, uint64_t seed, int64_t element, int64_t n,
                    const float* values, float* kept) {
    // Whole groups of four words, sixteen groups at a time.
    alignas(64) uint32_t words[kBlock + 64];
    const Stream stream = make_stream(seed, mask.tensor_id, uint32_t(*mask.draw), Law::uniform32);
    const int64_t lead = element % 4, groups = (lead + n + 63) / 64 * 16;
    store_words(stream, uint32_t(element / 4), groups, words);
    const bool all = *mask.limit >> 32 != 0;
    const uint32_t limit = uint32_t(*mask.limit);
    for (int64_t j = 0; j < n; ++j) kept[j] = (words[lead + j] < limit) | all ? values[j] : 0.0f;
}

// Values [i, i + n), n ≤ kBlock, which lie in one row, the first being `element` of the full
// tensor: those that the mask keeps, zeros instead of the others.
void keep(const MaskTensor& mask, uint64_t seed, int64_t i, int64_t n, int64_t element,
          const float* values, float* kept) {
    if (mask.threshold != nullptr)
        keep_by_threshold(mask, i, n, values, kept);
    else
        keep_at_random(mask, seed, element, n, values, kept);
}

}  // namespace
}  // namespace zokern
