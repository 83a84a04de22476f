// Blocks of float32 values that lie in tensors of other types.
//
// The including file has defined load_block and store_block<storage>.
#pragma once

#include "driver.h"

namespace zokern {
namespace {

// Where elements [i, i + n) are, the buffer where they are converted.
const float* floats_of(const DenseTensor& dense, int64_t i, int64_t n, float* buffer) {
    if (dense.type == Storage::fp32) return static_cast<const float*>(dense.data) + i;
    load_dense(dense, i, n, buffer);
    return buffer;
}

void store_dense(void* data, Storage type, int64_t i, int64_t n, const float* values) {
    SweepTensor as_param{};
    as_param.param = data;
    switch (type) {
        case Storage::bf16:
            return store_block<Storage::bf16>(as_param, i, n, values);
        case Storage::fp16:
            return store_block<Storage::fp16>(as_param, i, n, values);
        default:
            return store_block<Storage::fp32>(as_param, i, n, values);
    }
}

// Values, rounded to a 16-bit type and back; what they are rounded to goes to `rounded`.
void round_into(void* rounded, Storage type, float* values, int64_t n) {
    store_dense(rounded, type, 0, n, values);
    load_dense({rounded, type}, 0, n, values);
}

// At most kBlock values, rounded to a type and back.
void round_to(Storage type, float* values, int64_t n) {
    if (type == Storage::fp32) return;
    uint16_t rounded[kBlock];
    round_into(rounded, type, values, n);
}

}  // namespace
}  // namespace zokern
