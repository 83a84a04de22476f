// An octet of the values whose magnitudes are looked at.
#pragma once

#include "../magnitudes.h"
#include "unit.h"

namespace zokern {

ZK_FN float rounded_to(Storage type, float value) {
    if (type == Storage::bf16) return from_bf16(to_bf16(value));
    return type == Storage::fp16 ? from_fp16(to_fp16(value)) : value;
}

ZK_FN void load_steps(const AdamTensor& adam, const Unit& unit, float* values) {
    const AdamNumbers numbers = *adam.numbers;
    float first[8], second[8];
    load_dense(adam.grad, unit, values);
    load_dense(adam.exp_avg, unit, first);
    load_dense(adam.exp_avg_sq, unit, second);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        const Moments next = next_moments(numbers, values[j], {first[j], second[j]});
        values[j] = adam_delta(numbers, {rounded_to(adam.exp_avg.type, next.first),
                                         rounded_to(adam.exp_avg_sq.type, next.second)});
    }
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
    for (int j = 0; j < 8; ++j) {
        values[j] -= base[j];
        if (value.rounded) values[j] = rounded_to(value.tensor.type, values[j]);
    }
}

}  // namespace zokern
