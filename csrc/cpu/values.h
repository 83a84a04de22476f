// Blocks of the values whose magnitudes are looked at.
#pragma once

#include "../magnitudes.h"
#include "adam_block.h"

namespace zokern {
namespace {

// Where values [i, i + n) are, n ≤ kBlock: in the tensor itself or in the buffer.
const float* values_of(const ValueTensor& tensor, int64_t i, int64_t n, float* buffer) {
    if (tensor.adam.grad.data != nullptr) {
        load_adam_delta(tensor.adam, i, n, buffer);
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

}  // namespace
}  // namespace zokern
