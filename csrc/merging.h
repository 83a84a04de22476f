// What the merging optimizers' operations work on; the words of zokern/merging.py in C++.
#pragma once

#include <cstdint>
#include <vector>

#include "adam.h"
#include "sweep.h"

namespace zokern {

// Of which Adam's Δ is computed, without a change to them.
struct AdamTensor {
    DenseTensor grad, exp_avg, exp_avg_sq;
    const float* cached;  // or null
    const AdamNumbers* numbers;
    const int64_t* merges;
};

// A contiguous tensor of float32 values: Adam's Δ where there is a gradient, else the tensor less
// the base, where there is one, rounded to the tensor's type where it is so wanted.
struct ValueTensor {
    int64_t numel;
    DenseTensor tensor, base;
    bool rounded;
    AdamTensor adam;
};

// Of a tensor's elements: those above the threshold in magnitude, and those at it whose index is
// below the cut; without a threshold, those whose word of uniform32 is below the limit.
struct MaskTensor {
    const float* threshold;  // or null
    const int64_t* cut;
    const int64_t *draw, *limit;
    int64_t offset, row_length, row_stride;  // see SweepTensor
    uint64_t tensor_id;
};

enum class Method : int { dare = 0, dare_paper = 1, ties = 2, ties_paper = 3, ema = 4 };

// In dare_paper τ has a mask of its own on each step, whose draw is this far from the step's.
constexpr uint32_t kTauDraws = 1u << 31;

// Either dense (starts is null) or sparse, as SparseTau of zokern/merging.py.
struct TauTensor {
    DenseTensor values;  // data is null where there is no τ
    const int64_t* starts;
    const uint16_t* places;
};

// A contiguous operand of a step; its moments and cached Δ are written.
struct MergeTensor {
    void* param;
    void* residual;
    float* master;  // or null
    int64_t numel;
    Storage storage;
    AdamTensor adam;
    MaskTensor mask;
    TauTensor tau;
};

struct MergeStep {
    std::vector<MergeTensor> tensors;
    Method method;
    uint64_t seed;
};

}  // namespace zokern
