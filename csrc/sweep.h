// What one sweep over a list of tensors does. For each element, in float32:
//
//   t = master or parameter;  u = decay momentum
//   for k < rest:   t ← s_k t;  t ← fma(c_k, z_k, t);  u ← fma(g_k, z_k, u)
//   momentum = u;  t ← fma(step, u or its sign, t)       only where the sweep updates
//   master = t                                           only where rest > 0
//   for k ≥ rest:   t ← s_k t;  t ← fma(c_k, z_k, t)
//   parameter = t                                        or out = t, and the rest stays as it is
//
// z_k is the noise of a draw or an element of a dense direction. What is stored is rounded to
// nearest or, where there is a draw of rounding16 for it, stochastically.
#pragma once

#include <cstdint>
#include <vector>

#include "storage.h"

namespace zokern {

constexpr int kMaxDense = 2;

// An element type of a dense direction: Storage::fp32, bf16 or fp16.
struct DenseTensor {
    const void* data;
    Storage type;
};

// A contiguous operand. Its element (r, k), in rows of row_length, is element
// offset + r row_stride + k of the full tensor; with `rows`, offset + rows[r] row_stride + k.
struct SweepTensor {
    void* param;
    void* residual;
    float* master;    // or null: then θ is the parameter and its residual
    float* momentum;  // or null: then u begins at 0
    void* out;        // of the parameter's type, or null: then the sweep is in place
    DenseTensor dense[kMaxDense];
    int64_t numel;
    int64_t offset, row_length, row_stride;
    const int64_t* rows;  // or null
    uint64_t tensor_id;
    Storage storage;
    int32_t row;  // of the coefficients, scales and gradients
    float decay, step;
};

struct Sweep {
    std::vector<SweepTensor> tensors;
    Law law;
    uint64_t seed;
    std::vector<int64_t> draws;  // K; ~j stands for dense[j]
    std::vector<float> coeffs;   // rows × K
    std::vector<float> scales;   // rows × K
    int64_t rest;
    bool updates, sign;
    std::vector<float> gradient;  // rows × K, or empty where the sweep does not update
    int64_t rounding;             // the draw that rounds, or -1: to nearest
    bool plain;                   // no masters, dense directions, update or stochastic rounding
};

// Whose inner products with themselves and with the noise of a draw are wanted.
struct ProductTensor {
    DenseTensor vector;
    int64_t numel;
    int64_t offset, row_length, row_stride;
    uint64_t tensor_id;
};

struct Products {
    std::vector<ProductTensor> tensors;
    Law law;
    uint64_t seed;
    uint32_t draw;
};

}  // namespace zokern
