// How merges of models over a base are cut into launches and blocks; see plan.h.
#pragma once

#include "../deltas.h"
#include "plan.h"

namespace zokern {

// Without residuals or rows of several: the whole tensor.
struct DeltaOperand : Extent {
    DenseTensor base;
    void* out;
    Storage out_type;
    uint32_t first_source;  // of the launch's
};

struct DeltaBatch : Batch<DeltaOperand, 48> {
    static constexpr uint32_t kMaxSources = 448;

    DeltaSource sources[kMaxSources];
    DeltaRules rules;
};
static_assert(sizeof(DeltaBatch) <= kParameterBytes, "kernel parameters");
static_assert(DeltaBatch::kMaxSources >= kMaxModels, "every tensor fits a launch");

struct DeltaLaunch {
    uint32_t blocks;
    DeltaBatch batch;
};

std::vector<DeltaLaunch> plan_merge(const DeltaMerge& merge);

}  // namespace zokern
