// The kernels of the search for the k-th largest magnitude; see select_plan.h.
#pragma once

#include "context.h"
#include "select_plan.h"
#include "value_body.h"

namespace zokern {

ZK_FN bool has_ties(const GroupState& state) {
    return state.progress == Progress::searching && state.rank < state.equals;
}

// Counts a block's values by the first digit, in shared memory, and finds the largest.
template <class Block>
ZK_FN void count_first_digit(Block block, const ValueBatch& batch, uint32_t* shared) {
    const ValueOperand& operand = batch.operands[find_operand(batch, block.block())];
    const Share share = share_of(batch, find_operand(batch, block.block()), block.block());
    const uint32_t bins = 1u << operand.digit.bits;
    block.phase([&](uint32_t thread) {
        for (uint32_t bin = thread; bin <= bins; bin += block.threads()) shared[bin] = 0;
    });
    block.phase([&](uint32_t thread) {
        uint32_t largest = 0;
        for (uint64_t i = share.begin + thread; i < share.end; i += block.threads()) {
            const Unit unit = locate(operand, i);
            float values[8];
            load_octet(operand.value, unit, values);
            ZK_UNROLL
            for (int j = 0; j < 8; ++j) {
                if (unit.mask >> j & 1u) {
                    const uint32_t m = magnitude(values[j]);
                    largest = m > largest ? m : largest;
                    block.count(shared + (m >> operand.digit.shift));
                }
            }
        }
        block.raise(shared + bins, largest);
    });
    block.phase([&](uint32_t thread) {
        for (uint32_t bin = thread; bin < bins; bin += block.threads()) {
            if (shared[bin] != 0) block.add(operand.counts + bin, shared[bin]);
        }
        if (thread == 0) block.raise(batch.largest + operand.index, shared[bins]);
    });
}

// Counts the few of a block's values that lie in the interval by a later digit.
template <class Block>
ZK_FN void count_next_digit(Block block, const ValueBatch& batch) {
    const ValueOperand& operand = batch.operands[find_operand(batch, block.block())];
    const Share share = share_of(batch, find_operand(batch, block.block()), block.block());
    const GroupState& state = batch.states[operand.group];
    if (state.progress != Progress::searching) return;
    const uint32_t low = state.low, width = 1u << (operand.digit.shift + operand.digit.bits);
    block.phase([&](uint32_t thread) {
        for (uint64_t i = share.begin + thread; i < share.end; i += block.threads()) {
            const Unit unit = locate(operand, i);
            float values[8];
            load_octet(operand.value, unit, values);
            ZK_UNROLL
            for (int j = 0; j < 8; ++j) {
                const uint32_t place = magnitude(values[j]) - low;
                if ((unit.mask >> j & 1u) && place < width)
                    block.count(operand.counts + (place >> operand.digit.shift));
            }
        }
    });
}

// The first i for which value(0) + … + value(i) reaches the rank, and the rank among value(i)
// alone, to `found` in one thread. The sums are kThreads of them that the block's threads share.
template <class Block, class Value, class Found>
ZK_FN void find_rank(Block block, uint64_t count, uint64_t rank, Counter* sums, const Value& value,
                     const Found& found) {
    const uint64_t share = (count + kThreads - 1) / kThreads;
    block.phase([&](uint32_t thread) {
        Counter sum = 0;
        for (uint64_t i = thread * share; i < (thread + 1) * share && i < count; ++i)
            sum += value(i);
        sums[thread] = sum;
    });
    block.phase([&](uint32_t thread) {
        if (thread != 0) return;
        uint64_t left = rank, i = 0;
        for (; left > sums[i]; ++i) left -= sums[i];
        Counter own = value(i *= share);
        for (; left > own; own = value(++i)) left -= own;
        found(i, left);
    });
}

// Takes the bin that the wanted magnitude lies in for the next interval, and clears the counters.
template <class Block>
ZK_FN void decide_digit(Block block, const GroupBatch& batch, Counter* sums) {
    const GroupOperand& group = batch.operands[block.block()];
    GroupState& state = batch.states[group.group];
    const uint32_t bins = 1u << group.digit.bits;
    const bool nothing = group.k == 0, all = group.k >= group.numel;
    if (nothing || all) {
        block.phase([&](uint32_t thread) {
            if (thread == 0)
                state.progress = nothing ? Progress::keeps_nothing : Progress::keeps_all;
        });
        return;
    }
    const uint64_t rank = batch.first_pass ? group.k : state.rank;
    const auto from_top = [&](uint64_t i) { return group.counts[bins - 1 - i]; };
    find_rank(block, bins, rank, sums, from_top, [&](uint64_t i, uint64_t left) {
        state.low += (bins - 1 - uint32_t(i)) << group.digit.shift;
        state.rank = left;
        state.equals = from_top(i);
    });
    block.phase([&](uint32_t thread) {
        for (uint32_t bin = thread; bin < bins; bin += kThreads) group.counts[bin] = 0;
    });
}

ZK_FN uint32_t equals_in(const ValueOperand& operand, uint64_t index, uint32_t wanted) {
    const Unit unit = locate(operand, index);
    float values[8];
    load_octet(operand.value, unit, values);
    uint32_t equals = 0;
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        if ((unit.mask >> j & 1u) && magnitude(values[j]) == wanted) equals |= 1u << j;
    }
    return equals;
}

ZK_FN uint32_t count_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
    return uint32_t(__popc(bits));
#else
    return uint32_t(__builtin_popcount(bits));
#endif
}

// How many of a block's values are at the threshold; only where not all of them are kept.
template <class Block>
ZK_FN void count_ties(Block block, const ValueBatch& batch, Counter* sums) {
    const ValueOperand& operand = batch.operands[find_operand(batch, block.block())];
    const Share share = share_of(batch, find_operand(batch, block.block()), block.block());
    const GroupState& state = batch.states[operand.group];
    if (!has_ties(state)) return;
    block.phase([&](uint32_t thread) {
        Counter ties = 0;
        for (uint64_t i = share.begin + thread; i < share.end; i += kThreads)
            ties += count_bits(equals_in(operand, i, state.low));
        sums[thread] = ties;
    });
    block.phase([&](uint32_t thread) {
        if (thread != 0) return;
        Counter ties = 0;
        for (uint32_t i = 0; i < kThreads; ++i) ties += sums[i];
        batch.ties[block.block()] = ties;
    });
}

// The block in which the last of the equals that are kept lies.
template <class Block>
ZK_FN void decide_ties(Block block, const GroupBatch& batch, Counter* sums) {
    const GroupOperand& group = batch.operands[block.block()];
    GroupState& state = batch.states[group.group];
    if (!has_ties(state)) return;
    const Counter* ties = batch.ties + group.first_block;
    find_rank(
        block, group.blocks, state.rank, sums, [&](uint64_t i) { return ties[i]; },
        [&](uint64_t i, uint64_t left) {
            state.tie_block = group.first_block + i;
            state.tie_rank = left;
        });
}

// In that block, the element after it.
template <class Block>
ZK_FN void find_tie(Block block, const ValueBatch& batch, Counter* sums) {
    const ValueOperand& operand = batch.operands[find_operand(batch, block.block())];
    const Share share = share_of(batch, find_operand(batch, block.block()), block.block());
    GroupState& state = batch.states[operand.group];
    if (!has_ties(state) || batch.first_block + block.block() != state.tie_block) return;
    const auto equals = [&](uint64_t i) { return equals_in(operand, share.begin + i, state.low); };
    find_rank(
        block, share.end - share.begin, state.tie_rank, sums,
        [&](uint64_t i) { return Counter(count_bits(equals(i))); },
        [&](uint64_t i, uint64_t left) {
            uint32_t bits = equals(i);
            int j = 0;
            for (; left > 1 || (bits & 1u) == 0; ++j, bits >>= 1) left -= bits & 1u;
            state.tie_end = locate(operand, share.begin + i).first + j + 1;
        });
}

template <class Context>
ZK_FN void answer_body(Context at, const AnswerBatch& batch) {
    const uint32_t which = at.block() * kThreads + at.thread();
    if (which >= batch.operand_count) return;
    const AnswerOperand& tensor = batch.operands[which];
    const GroupState& state = batch.states[tensor.group];
    uint32_t threshold = state.low;
    int64_t cut = int64_t(tensor.numel);
    if (state.progress == Progress::keeps_nothing) {
        threshold = kKeepsNothing;
        cut = 0;
    } else if (has_ties(state) && state.tie_block < tensor.first_block) {
        cut = 0;
    } else if (has_ties(state) && state.tie_block < tensor.first_block + tensor.blocks) {
        cut = state.tie_end;
    }
    batch.thresholds[tensor.index] = threshold;
    batch.cuts[tensor.index] = cut;
}

}  // namespace zokern
