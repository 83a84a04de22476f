#include "plan.h"

#include <algorithm>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "extents.h"

namespace zokern {
namespace {

// Each leaves partial sums to be copied and added up, so they are no more than keep a GPU busy, but
// for one more that a tensor may take.
constexpr uint64_t kProductBlocks = 2048;

void describe(const SweepTensor& t, Law law, Operand& o) {
    static_cast<Extent&>(o) = extent_of(t, law);
    o.param = static_cast<char*>(t.param);
    o.residual = static_cast<char*>(t.residual);
    o.out = static_cast<char*>(t.out);
    o.picked = t.rows;
    // Picked rows may follow on one another in any order.
    const bool in_step = t.rows == nullptr || (t.row_length % 8 == 0 && t.row_stride % 8 == 0);
    o.vectors = in_step && on_boundaries(t.param, param_bytes(t.storage), o) &&
                on_boundaries(t.residual, residual_bytes(t.storage), o) &&
                on_boundaries(t.out, param_bytes(t.storage), o);
}

void describe(const SweepTensor& t, Law law, UpdateOperand& o) {
    describe(t, law, static_cast<Operand&>(o));
    o.master = t.master;
    o.momentum = t.momentum;
    o.decay = t.decay;
    o.step = t.step;
    o.vectors = o.vectors && on_boundaries(t.master, sizeof(float), o) &&
                on_boundaries(t.momentum, sizeof(float), o);
    for (int slot = 0; slot < kMaxDense; ++slot) {
        o.dense[slot] = t.dense[slot];
        o.vectors = o.vectors && on_boundaries(t.dense[slot], o);
    }
}

// Fills launches of one kernel, one after the other.
template <class BatchType>
class Packer {
  public:
    using Launch = MoveLaunch<BatchType>;

    // The launches begin as copies of an empty one.
    Packer(const Sweep& sweep, const Launch& empty, std::vector<Launch>& launches)
        : sweep_(sweep), empty_(empty), launches_(launches) {}

    template <class OperandType>
    void add(const SweepTensor& tensor, OperandType operand) {
        if (launch_ == nullptr || !fits(tensor.row, blocks_of(operand, empty_.batch.steps))) {
            launches_.push_back(empty_);
            launch_ = &launches_.back();
            packed_.clear();
            factors_ = 0;
        }
        operand.first_factor = factors_of(tensor.row);
        append(*launch_, operand);
    }

  private:
    bool fits(int32_t row, uint64_t blocks) const {
        const bool has_factors =
            packed_.count(row) || factors_ + sweep_.draws.size() <= kMaxFactors;
        return has_factors && launch_->batch.operand_count < BatchType::kMaxOperands &&
               launch_->blocks + blocks <= kMaxBlocks;
    }

    uint32_t factors_of(int32_t row) {
        const auto [entry, is_new] = packed_.try_emplace(row, factors_);
        if (is_new) {
            const size_t count = sweep_.draws.size(), begin = size_t(row) * count;
            for (size_t k = begin; k < begin + count; ++k) {
                pack_gradient(k, launch_->batch);
                launch_->batch.factors[factors_++] = {sweep_.coeffs[k], sweep_.scales[k]};
                launch_->batch.scaled |= sweep_.scales[k] != 1.0f;
            }
        }
        return entry->second;
    }

    void pack_gradient(size_t k, UpdateBatch& batch) const {
        if (sweep_.updates) batch.gradient[factors_] = sweep_.gradient[k];
    }
    void pack_gradient(size_t, SweepBatch&) const {}

    const Sweep& sweep_;
    const Launch empty_;
    std::vector<Launch>& launches_;
    Launch* launch_ = nullptr;
    std::map<int32_t, uint32_t> packed_;  // row → its first factor
    uint32_t factors_ = 0;
};

template <class OperandType, uint32_t capacity>
void begin(const Sweep& sweep, MoveBatch<OperandType, capacity>& batch) {
    for (size_t k = 0; k < sweep.draws.size(); ++k) batch.draws[k] = uint32_t(sweep.draws[k]);
    batch.keys = key_schedule(uint32_t(sweep.seed), uint32_t(sweep.seed >> 32));
    batch.directions = uint32_t(sweep.draws.size());
}

void begin(const Sweep& sweep, UpdateBatch& batch) {
    begin(sweep, static_cast<MoveBatch<UpdateOperand, UpdateBatch::kMaxOperands>&>(batch));
    for (size_t k = 0; k < sweep.draws.size(); ++k)
        batch.dense[k / 32] |= uint32_t(sweep.draws[k] < 0) << (k % 32);
    batch.rest = uint32_t(sweep.rest);
    batch.updates = sweep.updates;
    batch.sign = sweep.sign;
    const bool dense =
        std::any_of(sweep.draws.begin(), sweep.draws.end(), [](int64_t draw) { return draw < 0; });
    const bool one_part = batch.rest == 0 || batch.rest == batch.directions;
    batch.moves = !sweep.updates && !dense && one_part;
    batch.rounds = sweep.rounding >= 0;
    batch.rounding = uint32_t(sweep.rounding);
}

void check_directions(size_t count) {
    if (count > kMaxDirections)
        throw std::runtime_error(std::to_string(count) + " directions: one CUDA sweep takes " +
                                 std::to_string(kMaxDirections) + " at most");
}

template <class BatchType>
std::vector<MoveLaunch<BatchType>> plan(const Sweep& sweep) {
    using OperandType = std::remove_extent_t<decltype(BatchType::operands)>;
    check_directions(sweep.draws.size());
    // A launch has one kernel; the order of the launches does not matter.
    std::map<std::pair<Storage, bool>, std::vector<const SweepTensor*>> by_kernel;
    for (const SweepTensor& tensor : sweep.tensors)
        if (tensor.numel > 0)
            by_kernel[{tensor.storage, tensor.master != nullptr}].push_back(&tensor);

    std::vector<MoveLaunch<BatchType>> launches;
    for (const auto& [kernel, tensors] : by_kernel) {
        std::vector<OperandType> operands(tensors.size());
        uint64_t units = 0;
        for (size_t i = 0; i < tensors.size(); ++i) {
            describe(*tensors[i], sweep.law, operands[i]);
            units += units_of(operands[i]);
        }
        MoveLaunch<BatchType> empty{kernel.first, kernel.second, 0, {}};
        begin(sweep, empty.batch);
        empty.batch.steps = steps_for(units);
        Packer<BatchType> packer(sweep, empty, launches);
        for (size_t i = 0; i < tensors.size(); ++i) packer.add(*tensors[i], operands[i]);
    }
    return launches;
}

MergeOperand describe(const MergeTensor& t) {
    const MaskTensor& mask = t.mask;
    const ProductTensor place = {
        {}, t.numel, mask.offset, mask.row_length, mask.row_stride, mask.tensor_id};
    MergeOperand o{};
    static_cast<Extent&>(o) = extent_of(place, Law::uniform32);
    o.tensor = t;
    o.vectors = on_boundaries(t.param, param_bytes(t.storage), o) &&
                on_boundaries(t.residual, residual_bytes(t.storage), o) &&
                on_boundaries(t.master, sizeof(float), o) &&
                on_boundaries(t.adam.cached, sizeof(float), o) && on_boundaries(t.adam.grad, o) &&
                on_boundaries(t.adam.exp_avg, o) && on_boundaries(t.adam.exp_avg_sq, o) &&
                (t.tau.starts != nullptr || on_boundaries(t.tau.values, o));
    return o;
}

// Adds launches of one kernel, which begin as copies of an empty one.
void add_launches(const MergeLaunch& empty, const std::vector<MergeOperand>& operands,
                  std::vector<MergeLaunch>& launches) {
    launches.push_back(empty);
    for (const MergeOperand& operand : operands) {
        const uint64_t blocks = blocks_of(operand, empty.batch.steps);
        if (launches.back().batch.operand_count == MergeBatch::kMaxOperands ||
            launches.back().blocks + blocks > kMaxBlocks)
            launches.push_back(empty);
        append(launches.back(), operand);
    }
}

// The products' operands, those of empty tensors without rows, and the steps of their blocks.
struct ProductPlan {
    std::vector<ProductOperand> operands;
    uint32_t steps;
};

ProductPlan describe(const Products& products) {
    ProductPlan plan{};
    uint64_t units = 0;
    for (const ProductTensor& tensor : products.tensors) {
        ProductOperand o{};
        if (tensor.numel > 0) static_cast<Extent&>(o) = extent_of(tensor, products.law);
        o.vector = tensor.vector;
        o.vectors = on_boundaries(o.vector, o);
        plan.operands.push_back(o);
        units += units_of(o);
    }
    constexpr uint64_t units_at_once = kProductBlocks * kThreads;
    plan.steps = std::max(kMinSteps, uint32_t((units + units_at_once - 1) / units_at_once));
    return plan;
}

}  // namespace

std::vector<SweepLaunch> plan_sweep(const Sweep& sweep) { return plan<SweepBatch>(sweep); }

std::vector<UpdateLaunch> plan_update(const Sweep& sweep) { return plan<UpdateBatch>(sweep); }

std::vector<MergeLaunch> plan_merge(const MergeStep& step) {
    std::map<std::pair<Storage, bool>, std::vector<MergeOperand>> by_kernel;
    for (const MergeTensor& tensor : step.tensors)
        if (tensor.numel > 0)
            by_kernel[{tensor.storage, tensor.master != nullptr}].push_back(describe(tensor));

    std::vector<MergeLaunch> launches;
    for (const auto& [kernel, operands] : by_kernel) {
        uint64_t units = 0;
        for (const MergeOperand& operand : operands) units += units_of(operand);
        MergeLaunch empty{kernel.first, kernel.second, 0, {}};
        empty.batch.keys = key_schedule(uint32_t(step.seed), uint32_t(step.seed >> 32));
        empty.batch.method = step.method;
        empty.batch.steps = steps_for(units);
        add_launches(empty, operands, launches);
    }
    return launches;
}

std::vector<uint32_t> product_blocks(const Products& products) {
    const ProductPlan plan = describe(products);
    std::vector<uint32_t> blocks;
    for (const ProductOperand& operand : plan.operands)
        blocks.push_back(uint32_t(blocks_of(operand, plan.steps)));
    return blocks;
}

std::vector<ProductLaunch> plan_products(const Products& products, ExactProducts* partials) {
    const ProductPlan plan = describe(products);
    ProductLaunch empty{};
    empty.batch.keys = key_schedule(uint32_t(products.seed), uint32_t(products.seed >> 32));
    empty.batch.steps = plan.steps;
    empty.batch.draw = products.draw;
    std::vector<ProductLaunch> launches;
    for (const ProductOperand& operand : plan.operands) {
        if (operand.rows == 0) continue;
        if (launches.empty() || launches.back().batch.operand_count == ProductBatch::kMaxOperands) {
            if (!launches.empty()) partials += launches.back().blocks;
            launches.push_back(empty);
            launches.back().batch.partials = partials;
        }
        append(launches.back(), operand);
    }
    return launches;
}

size_t count_partials(const Products& products) {
    const std::vector<uint32_t> blocks = product_blocks(products);
    return std::accumulate(blocks.begin(), blocks.end(), size_t(0));
}

void sum_partials(const Products& products, const ExactProducts* partials, double* out) {
    for (const uint32_t blocks : product_blocks(products)) {
        ExactProducts total{};
        for (uint32_t block = 0; block < blocks; ++block) add(total, *partials++);
        for (const ExactSum& sum : {total.vv, total.vz, total.zz}) *out++ = sum.high + sum.low;
    }
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
