// What is asked of magnitudes: the words Selection and L1Sums of zokern/merging.py in C++.
//
// A magnitude is a float32's bits without the sign, compared as an integer: NaN is above infinity.
#pragma once

#include "merging.h"

namespace zokern {

struct Selection {
    std::vector<ValueTensor> tensors;
    std::vector<int64_t> k;  // of each tensor, or one of all as if they were joined
    bool joined;
};

// For each tensor: the threshold, the cut below which its equals are kept, the largest magnitude.
struct Thresholds {
    float* thresholds;
    int64_t* cuts;
    float* largest;
};

struct L1Sums {
    std::vector<ValueTensor> tensors;
    std::vector<MaskTensor> masks;
    uint64_t seed;
};

constexpr uint32_t kMagnitude = 0x7FFFFFFFu;
// The threshold that no magnitude is above; with a cut of 0 nothing is kept.
constexpr uint32_t kKeepsNothing = kMagnitude;

ZK_FN uint32_t magnitude(float value) { return float_bits(value) & kMagnitude; }

// How many of a magnitude's last bits are 0 in all values of a tensor.
ZK_FN int zero_bits(const ValueTensor& tensor) {
    const bool exact = tensor.base.data == nullptr || tensor.rounded;
    if (tensor.adam.grad.data != nullptr || !exact) return 0;
    return tensor.tensor.type == Storage::bf16 ? 16 : tensor.tensor.type == Storage::fp16 ? 13 : 0;
}

// Between them lie all magnitudes of float16 but 0, infinity and NaN.
constexpr uint32_t kHalfLow = 0x33000000u, kHalfHigh = 0x47800000u;

// The magnitudes from `low` on, `width` of them, in bins of 2^shift.
struct Bracket {
    uint32_t low, width;
    int shift;
};

ZK_FN uint32_t bins_of(const Bracket& b) {
    return uint32_t((uint64_t(b.width) + (uint64_t(1) << b.shift) - 1) >> b.shift);
}

}  // namespace zokern
