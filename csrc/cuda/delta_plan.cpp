#include "delta_plan.h"

#include <algorithm>

#include "extents.h"

namespace zokern {
namespace {

DeltaOperand describe(const DeltaTensor& t, const DeltaSource* sources, int models) {
    const ProductTensor whole = {t.base, t.numel, 0, t.numel, t.numel, t.tensor_id};
    DeltaOperand o{};
    static_cast<Extent&>(o) = extent_of(whole, Law::uniform32);
    o.base = t.base;
    o.out = t.out;
    o.out_type = t.out_type;
    o.vectors = on_boundaries(t.out, param_bytes(t.out_type), o) && on_boundaries(t.base, o);
    for (int m = 0; m < models; ++m) o.vectors = o.vectors && on_boundaries(sources[m].tensor, o);
    return o;
}

}  // namespace

std::vector<DeltaLaunch> plan_merge(const DeltaMerge& merge) {
    const int models = merge.rules.models;
    std::vector<DeltaOperand> operands;
    std::vector<const DeltaSource*> sources;
    uint64_t units = 0;
    for (const DeltaTensor& tensor : merge.tensors) {
        if (tensor.numel == 0) continue;
        sources.push_back(merge.sources.data() + tensor.first_source);
        operands.push_back(describe(tensor, sources.back(), models));
        units += units_of(operands.back());
    }
    DeltaLaunch empty{};
    empty.batch.keys = key_schedule(uint32_t(merge.rules.seed), uint32_t(merge.rules.seed >> 32));
    empty.batch.steps = steps_for(units);
    empty.batch.rules = merge.rules;
    std::vector<DeltaLaunch> launches;
    uint32_t used = 0;
    for (size_t i = 0; i < operands.size(); ++i) {
        const bool fits =
            !launches.empty() && used + models <= DeltaBatch::kMaxSources &&
            launches.back().batch.operand_count < DeltaBatch::kMaxOperands &&
            launches.back().blocks + blocks_of(operands[i], empty.batch.steps) <= kMaxBlocks;
        if (!fits) {
            launches.push_back(empty);
            used = 0;
        }
        operands[i].first_source = used;
        std::copy(sources[i], sources[i] + models, launches.back().batch.sources + used);
        append(launches.back(), operands[i]);
        used += uint32_t(models);
    }
    return launches;
}

}  // namespace zokern
