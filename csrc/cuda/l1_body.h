// The kernels of L1 sums: partial sums of each block, and their totals.
#pragma once

#include "context.h"
#include "select_plan.h"
#include "value_body.h"

namespace zokern {

ZK_FN void add(ExactSums& sums, const ExactSums& other) {
    add(sums.all, other.all);
    add(sums.kept, other.kept);
}

// Bit j for element j of the octet: whether the mask keeps it.
ZK_FN uint32_t kept_of(const SumBatch& batch, const SumOperand& operand, const Unit& unit,
                       const float* values) {
    const MaskTensor& mask = operand.mask;
    uint32_t kept = 0;
    if (mask.threshold != nullptr) {
        const uint32_t threshold = magnitude(*mask.threshold);
        const int64_t cut = *mask.cut;
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const uint32_t m = magnitude(values[j]);
            if (m > threshold || (m == threshold && unit.first + j < cut)) kept |= 1u << j;
        }
        return kept;
    }
    const BatchStream stream = {batch.keys, operand.c1, operand.c2, uint32_t(*mask.draw)};
    const uint64_t limit = uint64_t(*mask.limit);
    ZK_UNROLL
    for (int half = 0; half < 2; ++half) {
        const Words words = group_words(stream, uint32_t(2 * unit.octet_index) + half);
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
            if (words.w[j] < limit) kept |= 1u << (4 * half + j);
        }
    }
    return kept;
}

ZK_FN ExactSums thread_sums(const SumBatch& batch, uint32_t block, uint32_t thread) {
    const uint32_t which = find_operand(batch, block);
    const SumOperand& operand = batch.operands[which];
    const Share share = share_of(batch, which, block);
    ExactSums sums{};
    for (uint64_t i = share.begin + thread; i < share.end; i += kThreads) {
        const Unit unit = locate(operand, i);
        float values[8];
        load_octet(operand.value, unit, values);
        const uint32_t kept = kept_of(batch, operand, unit, values);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const double m = double(bits_float(magnitude(values[j])));
            const bool exists = unit.mask >> j & 1u;
            add(sums.all, exists ? m : 0.0);
            add(sums.kept, exists && (kept >> j & 1u) ? m : 0.0);
        }
    }
    return sums;
}

// `sums` is kThreads of them that the block's threads share; the total in the first.
template <class Block>
ZK_FN void add_up(Block block, ExactSums* sums) {
    for (uint32_t count = kThreads / 2; count > 0; count /= 2) {
        block.phase([&](uint32_t thread) {
            if (thread < count) add(sums[thread], sums[thread + count]);
        });
    }
}

template <class Block>
ZK_FN void l1_body(Block block, const SumBatch& batch, ExactSums* sums) {
    block.phase([&](uint32_t thread) { sums[thread] = thread_sums(batch, block.block(), thread); });
    add_up(block, sums);
    block.phase([&](uint32_t thread) {
        if (thread == 0) batch.partials[block.block()] = sums[0];
    });
}

template <class Block>
ZK_FN void total_body(Block block, const TotalBatch& batch, ExactSums* sums) {
    const TotalBatch::Part& part = batch.operands[block.block()];
    block.phase([&](uint32_t thread) {
        ExactSums own{};
        for (uint64_t i = thread; i < part.blocks; i += kThreads)
            add(own, batch.partials[part.first_block + i]);
        sums[thread] = own;
    });
    add_up(block, sums);
    block.phase([&](uint32_t thread) {
        if (thread != 0) return;
        batch.out[2 * block.block()] = total(sums[0].all);
        batch.out[2 * block.block() + 1] = total(sums[0].kept);
    });
}

}  // namespace zokern
