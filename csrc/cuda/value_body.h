// An octet of the values whose magnitudes are looked at.
#pragma once

#include "../magnitudes.h"
#include "unit.h"

namespace zokern {

template <Storage type>
ZK_FN void round_octet(float* values) {
    float rounded[8];
    decode<type>({encode<type>(values).param, {}}, rounded);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) values[j] = rounded[j];
}

// To fp32, bf16 or fp16, and back.
ZK_FN void round_octet(Storage type, float* values) {
    if (type == Storage::bf16)
        round_octet<Storage::bf16>(values);
    else if (type == Storage::fp16)
        round_octet<Storage::fp16>(values);
}

// The new moments, rounded to the dtypes of the state.
ZK_FN void load_moments(const AdamTensor& adam, const AdamNumbers& numbers, const Unit& unit,
                        float* first, float* second) {
    float grad[8];
    load_dense(adam.grad, unit, grad);
    load_dense(adam.exp_avg, unit, first);
    load_dense(adam.exp_avg_sq, unit, second);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        const Moments next = next_moments(numbers, grad[j], {first[j], second[j]});
        first[j] = next.first;
        second[j] = next.second;
    }
    round_octet(adam.exp_avg.type, first);
    round_octet(adam.exp_avg_sq.type, second);
}

ZK_FN void load_steps(const AdamTensor& adam, const Unit& unit, float* values) {
    const AdamNumbers numbers = *adam.numbers;
    float first[8], second[8];
    load_moments(adam, numbers, unit, first, second);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) values[j] = adam_delta(numbers, {first[j], second[j]});
    if (adam.cached != nullptr && *adam.merges != 0) {
        load_from<Storage::fp32>(adam.cached, nullptr, unit, first);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) values[j] += first[j];
    }
}

// Those of elements that do not exist mean nothing.
ZK_FN void load_octet(const ValueTensor& value, const Unit& unit, float* values) {
    if (value.adam.grad.data != nullptr) {
        load_steps(value.adam, unit, values);
        return;
    }
    load_dense(value.tensor, unit, values);
    if (value.base.data == nullptr) return;
    float base[8];
    load_dense(value.base, unit, base);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) values[j] -= base[j];
    if (value.rounded) round_octet(value.tensor.type, values);
}

}  // namespace zokern
