#include "plan.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>

namespace zokern {
namespace {

constexpr uint64_t kMaxBlocks = (uint64_t(1) << 31) - 1;

// Long blocks amortise their prologue; this many keep every multiprocessor busy to the end.
constexpr uint64_t kEnoughBlocks = 4096;
constexpr uint32_t kMinSteps = 4, kMaxSteps = 16;

uint32_t steps_for(uint64_t units) {
    uint32_t steps = kMinSteps;
    while (steps < kMaxSteps && units / (2 * steps * kThreads) >= kEnoughBlocks) steps *= 2;
    return steps;
}

bool on_boundaries(const void* base, uint64_t element_bytes, const Operand& o) {
    const uint64_t boundary = std::min<uint64_t>(16, 8 * element_bytes);
    const uint64_t origin = reinterpret_cast<uintptr_t>(base) - o.offset * element_bytes;
    const uint64_t row_shift = (o.row_stride - o.row_length) * element_bytes;
    return origin % boundary == 0 && (o.rows == 1 || row_shift % boundary == 0);
}

Operand describe(const SweepTensor& t, Law law) {
    const Stream stream = make_stream(0, t.tensor_id, 0, law);
    Operand o{};
    o.param = static_cast<char*>(t.param);
    o.residual = static_cast<char*>(t.residual);
    o.offset = uint64_t(t.offset);
    const bool one_row = t.row_length == t.numel || t.row_stride == t.row_length;
    o.row_length = uint64_t(one_row ? t.numel : t.row_length);
    o.row_stride = uint64_t(one_row ? t.numel : t.row_stride);
    o.rows = uint64_t(t.numel) / o.row_length;
    o.reciprocal = ~uint64_t(0) / units_per_row(o);
    o.c1 = stream.c1;
    o.c2 = stream.c2;
    const int residual_size = residual_bytes(t.storage);
    o.vectors = on_boundaries(t.param, uint64_t(param_bytes(t.storage)), o) &&
                (residual_size == 0 || on_boundaries(t.residual, uint64_t(residual_size), o));
    return o;
}

// Fills launches of one storage, one after the other.
class Packer {
  public:
    Packer(const Sweep& sweep, Storage storage, uint32_t steps, std::vector<SweepLaunch>& launches)
        : sweep_(sweep), storage_(storage), steps_(steps), launches_(launches) {}

    void add(const SweepTensor& tensor, Operand operand) {
        const uint64_t per_block = uint64_t(steps_) * kThreads;
        const uint64_t units = operand.rows * units_per_row(operand);
        const uint64_t blocks = (units + per_block - 1) / per_block;
        if (launch_ == nullptr || !fits(tensor.row, blocks)) open();
        operand.first_factor = factors_of(tensor.row);
        SweepBatch& batch = launch_->batch;
        batch.first_blocks[batch.operand_count] = launch_->blocks;
        batch.operands[batch.operand_count++] = operand;
        launch_->blocks += uint32_t(blocks);
    }

  private:
    bool fits(int32_t row, uint64_t blocks) const {
        const bool has_factors =
            packed_.count(row) || factors_ + sweep_.draws.size() <= kMaxFactors;
        return has_factors && launch_->batch.operand_count < kMaxOperands &&
               launch_->blocks + blocks <= kMaxBlocks;
    }

    void open() {
        launches_.push_back({storage_, 0, {}});
        launch_ = &launches_.back();
        SweepBatch& batch = launch_->batch;
        std::copy(sweep_.draws.begin(), sweep_.draws.end(), batch.draws);
        batch.keys = key_schedule(uint32_t(sweep_.seed), uint32_t(sweep_.seed >> 32));
        batch.directions = uint32_t(sweep_.draws.size());
        batch.steps = steps_;
        packed_.clear();
        factors_ = 0;
    }

    uint32_t factors_of(int32_t row) {
        const auto [entry, is_new] = packed_.try_emplace(row, factors_);
        if (is_new) {
            const size_t count = sweep_.draws.size(), begin = size_t(row) * count;
            for (size_t k = begin; k < begin + count; ++k) {
                launch_->batch.factors[factors_++] = {sweep_.coeffs[k], sweep_.scales[k]};
                launch_->batch.scaled |= sweep_.scales[k] != 1.0f;
            }
        }
        return entry->second;
    }

    const Sweep& sweep_;
    const Storage storage_;
    const uint32_t steps_;
    std::vector<SweepLaunch>& launches_;
    SweepLaunch* launch_ = nullptr;
    std::map<int32_t, uint32_t> packed_;  // row → its first factor
    uint32_t factors_ = 0;
};

void check_directions(size_t count) {
    if (count > kMaxDirections)
        throw std::runtime_error(std::to_string(count) + " directions: one CUDA sweep takes " +
                                 std::to_string(kMaxDirections) + " at most");
}

}  // namespace

std::vector<SweepLaunch> plan_sweep(const Sweep& sweep) {
    check_directions(sweep.draws.size());
    // A launch has one storage; the order of the launches does not matter.
    std::map<Storage, std::vector<const SweepTensor*>> by_storage;
    for (const SweepTensor& tensor : sweep.tensors)
        if (tensor.numel > 0) by_storage[tensor.storage].push_back(&tensor);

    std::vector<SweepLaunch> launches;
    for (const auto& [storage, tensors] : by_storage) {
        std::vector<Operand> operands;
        uint64_t units = 0;
        for (const SweepTensor* tensor : tensors) {
            operands.push_back(describe(*tensor, sweep.law));
            units += operands.back().rows * units_per_row(operands.back());
        }
        Packer packer(sweep, storage, steps_for(units), launches);
        for (size_t i = 0; i < tensors.size(); ++i) packer.add(*tensors[i], operands[i]);
    }
    return launches;
}

SampleLaunch plan_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                         int64_t offset, void* out) {
    const uint64_t units = (uint64_t(offset) % 8 + uint64_t(numel) + 7) / 8;
    const uint64_t blocks = numel == 0 ? 0 : (units + kThreads - 1) / kThreads;
    if (blocks > kMaxBlocks)
        throw std::runtime_error(std::to_string(numel) + " elements are too many for one launch");
    return {uint32_t(blocks),
            {out, uint64_t(offset), uint64_t(numel), make_stream(seed, tensor_id, draw, law)}};
}

}  // namespace zokern
