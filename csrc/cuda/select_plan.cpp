#include "select_plan.h"

#include <algorithm>

#include "extents.h"

namespace zokern {
namespace {

// Blocks of a pass: those of the first write their shared counters to memory, so they are few.
constexpr uint64_t kFirstBlocks = 256, kBlocks = 2048;
constexpr uint32_t kMinSteps = 4;

Extent whole(int64_t numel) {
    Extent e{};
    e.row_length = uint64_t(numel);
    e.rows = numel > 0;
    if (numel > 0) e.reciprocal = ~uint64_t(0) / units_per_row(e);
    return e;
}

bool on_boundaries(const ValueTensor& v, const Extent& e) {
    const AdamTensor& adam = v.adam;
    return on_boundaries(v.tensor, e) && on_boundaries(v.base, e) && on_boundaries(adam.grad, e) &&
           on_boundaries(adam.exp_avg, e) && on_boundaries(adam.exp_avg_sq, e) &&
           on_boundaries(adam.cached, sizeof(float), e);
}

// Blocks' steps so that about so many blocks go over all tensors, but for one more each.
template <class Tensors>
uint32_t steps_for(const Tensors& tensors, uint64_t blocks) {
    uint64_t units = 0;
    for (const auto& tensor : tensors) units += uint64_t(tensor.numel + 7) / 8;
    const uint64_t at_once = blocks * kThreads;
    return std::max(kMinSteps, uint32_t((units + at_once - 1) / at_once));
}

struct Group {
    uint64_t numel, k;
    Digits digits;
    uint64_t counts;  // where its counters are, in counters
};

// A selection's groups and how its memory is divided.
class Layout {
  public:
    Layout(const Selection& selection, size_t shared_bytes) : selection_(selection) {
        const size_t count = selection.tensors.size();
        for (size_t i = 0; i < (selection.joined ? 1 : count); ++i)
            add_group(i, selection.joined ? count : i + 1, shared_bytes);
        steps_ = steps_for(selection.tensors, kBlocks);
        for (const ValueTensor& tensor : selection.tensors) {
            first_blocks_.push_back(tie_blocks_);
            tie_blocks_ += blocks_of(whole(tensor.numel), steps_);
        }
        first_blocks_.push_back(tie_blocks_);
    }

    size_t bytes() const {
        return groups_.size() * sizeof(GroupState) + (counters_ + tie_blocks_) * sizeof(Counter);
    }

    GroupState* states(void* scratch) const { return static_cast<GroupState*>(scratch); }
    Counter* counts(void* scratch, size_t group) const {
        return reinterpret_cast<Counter*>(states(scratch) + groups_.size()) + groups_[group].counts;
    }
    Counter* ties(void* scratch) const {
        return reinterpret_cast<Counter*>(states(scratch) + groups_.size()) + counters_;
    }

    const std::vector<Group>& groups() const { return groups_; }
    size_t group_of(size_t i) const { return selection_.joined ? 0 : i; }
    uint32_t steps() const { return steps_; }
    uint64_t first_block(size_t i) const { return first_blocks_[i]; }

  private:
    void add_group(size_t begin, size_t end, size_t shared_bytes) {
        Group group{0, uint64_t(selection_.k.at(begin)), {}, counters_};
        int zeros = 16;
        for (size_t i = begin; i < end; ++i) {
            group.numel += uint64_t(selection_.tensors[i].numel);
            zeros = std::min(zeros, zero_bits(selection_.tensors[i]));
        }
        group.digits = digits_of(group.numel, zeros, shared_bytes);
        int most = 0;
        for (int d = 0; d < group.digits.count; ++d)
            most = std::max(most, group.digits.digits[d].bits);
        counters_ += uint64_t(1) << most;
        groups_.push_back(group);
    }

    const Selection& selection_;
    std::vector<Group> groups_;
    std::vector<uint64_t> first_blocks_;
    uint64_t counters_ = 0, tie_blocks_ = 0;
    uint32_t steps_;
};

// The launches over those tensors' values that `digit` gives an operand's digit for.
template <class DigitOf>
std::vector<ValueLaunch> plan_values(const Selection& selection, const Layout& layout,
                                     void* scratch, const Thresholds& out, uint32_t steps,
                                     const DigitOf& digit) {
    std::vector<ValueLaunch> launches;
    uint64_t block = 0;
    for (size_t i = 0; i < selection.tensors.size(); ++i) {
        const ValueTensor& tensor = selection.tensors[i];
        const size_t group = layout.group_of(i);
        Digit own;
        if (tensor.numel == 0 || !digit(group, own)) continue;
        ValueOperand o{};
        static_cast<Extent&>(o) = whole(tensor.numel);
        o.vectors = on_boundaries(tensor, o);
        o.value = tensor;
        o.index = uint32_t(i);
        o.group = uint32_t(group);
        o.counts = layout.counts(scratch, group);
        o.digit = own;
        if (launches.empty() || launches.back().batch.operand_count == ValueBatch::kMaxOperands) {
            launches.push_back({});
            ValueBatch& batch = launches.back().batch;
            batch.steps = steps;
            batch.states = layout.states(scratch);
            batch.largest = reinterpret_cast<uint32_t*>(out.largest);
            batch.ties = layout.ties(scratch) + block;
            batch.first_block = block;
        }
        append(launches.back(), o);
        block += blocks_of(o, steps);
    }
    return launches;
}

std::vector<GroupLaunch> plan_groups(const Layout& layout, void* scratch,
                                     const std::vector<GroupOperand>& operands) {
    std::vector<GroupLaunch> launches;
    for (const GroupOperand& operand : operands) {
        if (launches.empty() || launches.back().blocks == GroupBatch::kMaxOperands) {
            launches.push_back({});
            launches.back().batch.states = layout.states(scratch);
            launches.back().batch.ties = layout.ties(scratch);
        }
        launches.back().batch.operands[launches.back().blocks++] = operand;
    }
    return launches;
}

SelectPlan::Pass plan_pass(const Selection& selection, const Layout& layout, void* scratch,
                           const Thresholds& out, int pass) {
    const auto digit = [&](size_t group, Digit& own) {
        const Digits& digits = layout.groups()[group].digits;
        if (pass < digits.count) own = digits.digits[pass];
        return pass < digits.count;
    };
    SelectPlan::Pass plan;
    const uint32_t steps = pass == 0 ? steps_for(selection.tensors, kFirstBlocks) : layout.steps();
    plan.counts = plan_values(selection, layout, scratch, out, steps, digit);
    std::vector<GroupOperand> operands;
    for (size_t g = 0; g < layout.groups().size(); ++g) {
        const Group& group = layout.groups()[g];
        Digit own;
        if (!digit(g, own)) continue;
        operands.push_back(
            {group.k, group.numel, layout.counts(scratch, g), own, 0, 0, uint32_t(g)});
    }
    plan.decisions = plan_groups(layout, scratch, operands);
    for (GroupLaunch& launch : plan.decisions) launch.batch.first_pass = pass == 0;
    for (ValueLaunch& launch : plan.counts) {
        launch.batch.first_pass = pass == 0;
        int32_t bits = 0;
        for (uint32_t i = 0; i < launch.batch.operand_count; ++i)
            bits = std::max(bits, launch.batch.operands[i].digit.bits);
        // One more for the largest magnitude.
        if (pass == 0) launch.shared_bytes = uint32_t(sizeof(uint32_t)) * ((1u << bits) + 1);
    }
    return plan;
}

std::vector<AnswerLaunch> plan_answers(const Selection& selection, const Layout& layout,
                                       void* scratch, const Thresholds& out) {
    std::vector<AnswerLaunch> launches;
    for (size_t i = 0; i < selection.tensors.size(); ++i) {
        if (i % AnswerBatch::kMaxOperands == 0) {
            launches.push_back({});
            AnswerBatch& batch = launches.back().batch;
            batch.states = layout.states(scratch);
            batch.thresholds = reinterpret_cast<uint32_t*>(out.thresholds);
            batch.cuts = out.cuts;
        }
        AnswerLaunch& launch = launches.back();
        const uint64_t first = layout.first_block(i), blocks = layout.first_block(i + 1) - first;
        launch.batch.operands[launch.batch.operand_count++] = {uint64_t(selection.tensors[i].numel),
                                                               first, blocks, uint32_t(i),
                                                               uint32_t(layout.group_of(i))};
        launch.blocks = (launch.batch.operand_count + kThreads - 1) / kThreads;
    }
    return launches;
}

// What `extent_of` looks at.
struct MaskedTensor : MaskTensor {
    int64_t numel;
};

SumOperand describe(const L1Sums& sums, size_t i) {
    SumOperand o{};
    o.value = sums.tensors[i];
    o.mask = sums.masks[i];
    MaskedTensor masked{o.mask, o.value.numel};
    if (o.value.numel > 0) static_cast<Extent&>(o) = extent_of(masked, Law::uniform32);
    o.vectors = on_boundaries(o.value, o);
    return o;
}

}  // namespace

Digits digits_of(uint64_t numel, int zero_bits, size_t shared_bytes) {
    // The first digit's bits; the others follow so that the counters suffice for them.
    const bool has_room = shared_bytes >= sizeof(uint32_t) * ((size_t(1) << 15) + 1);
    const int sizes[3][kMaxDigits] = {{15, 16, 0, 0}, {11, 10, 10, 0}, {8, 8, 8, 7}};
    const int* size = sizes[numel >= 1 << 19 && has_room ? 0 : numel >= 1 << 14 ? 1 : 2];
    Digits digits{};
    for (int shift = 31; shift > zero_bits; ++digits.count) {
        const int next = std::max(shift - size[digits.count], zero_bits);
        digits.digits[digits.count] = {next, shift - next};
        shift = next;
    }
    return digits;
}

size_t select_scratch(const Selection& selection, size_t shared_bytes) {
    return Layout(selection, shared_bytes).bytes();
}

SelectPlan plan_select(const Selection& selection, const Thresholds& out, void* scratch,
                       size_t shared_bytes) {
    const Layout layout(selection, shared_bytes);
    SelectPlan plan;
    for (int pass = 0; pass < kMaxDigits; ++pass)
        plan.passes.push_back(plan_pass(selection, layout, scratch, out, pass));
    plan.ties =
        plan_values(selection, layout, scratch, out, layout.steps(), [](size_t, Digit& digit) {
            digit = {};
            return true;
        });
    std::vector<GroupOperand> operands;
    for (size_t g = 0; g < layout.groups().size(); ++g) {
        const size_t end = selection.joined ? selection.tensors.size() : g + 1;
        const uint64_t first = layout.first_block(g), blocks = layout.first_block(end) - first;
        operands.push_back({0, 0, nullptr, {}, first, blocks, uint32_t(g)});
    }
    plan.tie_decisions = plan_groups(layout, scratch, operands);
    plan.answers = plan_answers(selection, layout, scratch, out);
    return plan;
}

size_t l1_scratch(const L1Sums& sums) {
    const uint32_t steps = steps_for(sums.tensors, kBlocks);
    uint64_t blocks = 0;
    for (size_t i = 0; i < sums.tensors.size(); ++i) blocks += blocks_of(describe(sums, i), steps);
    return blocks * sizeof(ExactSums);
}

SumPlan plan_l1_sums(const L1Sums& sums, double* out, void* scratch) {
    const uint32_t steps = steps_for(sums.tensors, kBlocks);
    ExactSums* const partials = static_cast<ExactSums*>(scratch);
    SumPlan plan;
    uint64_t block = 0;
    for (size_t i = 0; i < sums.tensors.size(); ++i) {
        const SumOperand o = describe(sums, i);
        if (o.rows > 0 &&
            (plan.sums.empty() || plan.sums.back().batch.operand_count == SumBatch::kMaxOperands)) {
            plan.sums.push_back({});
            SumBatch& batch = plan.sums.back().batch;
            batch.steps = steps;
            batch.keys = key_schedule(uint32_t(sums.seed), uint32_t(sums.seed >> 32));
            batch.partials = partials + block;
        }
        if (o.rows > 0) append(plan.sums.back(), o);
        if (i % TotalBatch::kMaxOperands == 0) {
            plan.totals.push_back({});
            plan.totals.back().batch.partials = partials;
            plan.totals.back().batch.out = out + 2 * i;
        }
        const uint64_t blocks = blocks_of(o, steps);
        plan.totals.back().batch.operands[plan.totals.back().blocks++] = {block, blocks};
        block += blocks;
    }
    return plan;
}

}  // namespace zokern
