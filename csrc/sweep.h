// What one sweep over a list of tensors does: θ ← s_k θ, then θ ← fma(c_k, z_k, θ), for each
// direction in order, rounded once.
#pragma once

#include <cstdint>
#include <vector>

#include "storage.h"

namespace zokern {

// A contiguous operand. Its element (r, k), in rows of row_length, is element
// offset + r row_stride + k of the full tensor.
struct SweepTensor {
    void* param;
    void* residual;
    int64_t numel;
    int64_t offset, row_length, row_stride;
    uint64_t tensor_id;
    Storage storage;
    int32_t row;  // of the coefficients and scales
};

struct Sweep {
    std::vector<SweepTensor> tensors;
    Law law;
    uint64_t seed;
    std::vector<uint32_t> draws;  // K
    std::vector<float> coeffs;    // rows × K
    std::vector<float> scales;    // rows × K
};

}  // namespace zokern
