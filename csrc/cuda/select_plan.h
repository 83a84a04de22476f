// How the search for the k-th largest magnitude, and L1 sums, are cut into launches.
//
// Nothing is decided on the host: the state of a search lies in device memory. Each pass over the
// values counts how many of them fall into each bin of an interval, a digit of the magnitude; a
// small kernel then takes the bin that the wanted one lies in for the next interval.
#pragma once

#include "../magnitudes.h"
#include "plan.h"

namespace zokern {

using Counter = unsigned long long;  // CUDA's atomic operations know no uint64_t

enum class Progress : uint32_t { searching = 0, keeps_nothing = 1, keeps_all = 2 };

// Of a tensor, or of all that are joined. All zeros at first.
struct GroupState {
    uint64_t rank;    // of the wanted one among those in the interval, from the largest on
    uint64_t equals;  // how many are in the interval
    uint32_t low;     // the interval's first magnitude, at last the threshold
    Progress progress;
    uint64_t tie_block;  // the block of which some equals are kept and some not
    uint64_t tie_rank;   // of the last that is kept, from 1 on, in that block
    int64_t tie_end;     // the element after it, in its tensor
};

// The digit of a pass: magnitudes in [low, low + 2^(shift + bits)), in bins of 2^shift.
struct Digit {
    int32_t shift, bits;
};

constexpr int kMaxDigits = 4;
constexpr uint32_t kCountThreads = 512;

// How magnitudes whose last bits are 0 are cut into digits: so that counters take about a byte for
// each element, and those of the first digit no more shared memory than there is.
struct Digits {
    int32_t count;
    Digit digits[kMaxDigits];
};
Digits digits_of(uint64_t numel, int zero_bits, size_t shared_bytes);

struct ValueOperand : Extent {
    ValueTensor value;
    uint32_t index, group;
    Counter* counts;
    Digit digit;
};

struct ValueBatch : Batch<ValueOperand, 150> {
    GroupState* states;
    uint32_t* largest;     // of each tensor
    Counter* ties;         // of each block of this launch
    uint64_t first_block;  // among those of all launches
    uint32_t first_pass;
};
static_assert(sizeof(ValueBatch) <= kParameterBytes, "kernel parameters");

struct ValueLaunch {
    uint32_t blocks;
    uint32_t shared_bytes;
    ValueBatch batch;
};

// What is decided for a group by one block.
struct GroupOperand {
    uint64_t k, numel;
    Counter* counts;
    Digit digit;
    uint64_t first_block, blocks;  // of ties
    uint32_t group;
};

struct GroupBatch {
    static constexpr uint32_t kMaxOperands = 500;

    GroupOperand operands[kMaxOperands];
    GroupState* states;
    const Counter* ties;
    uint32_t first_pass;
};
static_assert(sizeof(GroupBatch) <= kParameterBytes, "kernel parameters");

struct GroupLaunch {
    uint32_t blocks;
    GroupBatch batch;
};

struct AnswerOperand {
    uint64_t numel, first_block, blocks;  // of ties
    uint32_t index, group;
};

struct AnswerBatch {
    static constexpr uint32_t kMaxOperands = 1000;

    AnswerOperand operands[kMaxOperands];
    const GroupState* states;
    uint32_t* thresholds;
    int64_t* cuts;
    uint32_t operand_count;
};
static_assert(sizeof(AnswerBatch) <= kParameterBytes, "kernel parameters");

struct AnswerLaunch {
    uint32_t blocks;
    AnswerBatch batch;
};

// In the order in which they are launched: each pass's counts and decisions, the ties' counts,
// decisions and ends, the answers.
struct SelectPlan {
    struct Pass {
        std::vector<ValueLaunch> counts;
        std::vector<GroupLaunch> decisions;
    };
    std::vector<Pass> passes;
    std::vector<ValueLaunch> ties;
    std::vector<GroupLaunch> tie_decisions;
    std::vector<AnswerLaunch> answers;
};

// Bytes of device memory, zeros, that a selection needs; `shared_bytes` is the shared memory that
// a block can have.
size_t select_scratch(const Selection& selection, size_t shared_bytes);
SelectPlan plan_select(const Selection& selection, const Thresholds& out, void* scratch,
                       size_t shared_bytes);

struct SumOperand : Extent {
    ValueTensor value;
    MaskTensor mask;
};

struct ExactSums {
    ExactSum all, kept;
};

struct SumBatch : Batch<SumOperand, 112> {
    ExactSums* partials;  // of the launch's blocks
};
static_assert(sizeof(SumBatch) <= kParameterBytes, "kernel parameters");

struct SumLaunch {
    uint32_t blocks;
    SumBatch batch;
};

struct TotalBatch {
    static constexpr uint32_t kMaxOperands = 1000;

    struct Part {
        uint64_t first_block, blocks;
    };
    Part operands[kMaxOperands];
    const ExactSums* partials;  // of all blocks
    double* out;                // of the first tensor
};
static_assert(sizeof(TotalBatch) <= kParameterBytes, "kernel parameters");

struct TotalLaunch {
    uint32_t blocks;
    TotalBatch batch;
};

struct SumPlan {
    std::vector<SumLaunch> sums;
    std::vector<TotalLaunch> totals;
};

size_t l1_scratch(const L1Sums& sums);
SumPlan plan_l1_sums(const L1Sums& sums, double* out, void* scratch);

}  // namespace zokern
