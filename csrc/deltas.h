// A merge of several models over a base; the words and the order of the arithmetic are those of
// zokern/deltas.py.
#pragma once

#include <cstdint>
#include <vector>

#include "sweep.h"

namespace zokern {

constexpr int kMaxModels = 64;

enum class Votes : int { none = 0, total = 1, weighted = 2, frequency = 3 };
enum class Combine : int { sum = 0, mean = 1, max = 2, sign = 3 };

// A model's tensor. Without a threshold its elements are kept whose word of uniform32 is below the
// limit; 2^32 keeps all.
struct DeltaSource {
    DenseTensor tensor;
    const float* ratio;      // or null: 1
    const float* threshold;  // or null
    const int64_t* cut;
    float weight;
    uint32_t draw;
    uint64_t limit;
};

// A contiguous output, its base (data is null where there is none) and its models' tensors.
struct DeltaTensor {
    void* out;
    Storage out_type;
    DenseTensor base;
    int64_t numel;
    uint64_t tensor_id;
    int64_t first_source;
};

struct DeltaRules {
    int models;
    uint64_t seed;
    bool rounded, zero_up;
    Votes votes;
    Combine combine;
    float divisor, scale;
};

struct DeltaMerge {
    std::vector<DeltaTensor> tensors;
    std::vector<DeltaSource> sources;  // of each tensor, one for each model
    DeltaRules rules;
};

ZK_FN float sign_or_zero(float x) { return float(x > 0.0f) - float(x < 0.0f); }

// +1 where the elected sign is positive, else -1.
ZK_FN float elected_sign(float elected, bool zero_up) {
    return elected > 0.0f || (elected == 0.0f && zero_up) ? 1.0f : -1.0f;
}

// `side` is above 0 for a vote that agrees with the elected sign and below 0 for its opposite.
ZK_FN float total_agreeing(float total, float side, float p) {
    return total + (side < 0.0f ? 0.0f : p);
}

ZK_FN float count_agreeing(float count, float side, float one) {
    return count + (side > 0.0f ? one : 0.0f);
}

ZK_FN float largest_agreeing(float total, float side, float p) {
    const float magnitude = bits_float(float_bits(p) & 0x7FFFFFFFu);
    return side < 0.0f || magnitude <= total || total != total ? total : magnitude;
}

}  // namespace zokern
