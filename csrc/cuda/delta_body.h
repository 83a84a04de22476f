// The kernel of merges of models over a base. The order of its work is that of zokern/deltas.py.
#pragma once

#include "context.h"
#include "delta_plan.h"
#include "value_body.h"

namespace zokern {

// Bit j: whether the model's mask keeps element j of an octet.
ZK_FN uint32_t kept_of(const DeltaBatch& batch, const DeltaOperand& operand,
                       const DeltaSource& source, const Unit& unit, const float* delta) {
    uint32_t kept = 0;
    if (source.threshold != nullptr) {
        const uint32_t threshold = magnitude(*source.threshold);
        const int64_t cut = *source.cut;
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const uint32_t m = magnitude(delta[j]);
            const bool keep = m > threshold || (m == threshold && unit.first + j < cut);
            kept |= uint32_t(keep) << j;
        }
    } else if (source.limit >> 32 != 0) {
        kept = 0xFFu;
    } else {
        const BatchStream stream = {batch.keys, operand.c1, operand.c2, source.draw};
        ZK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Words words = group_words(stream, uint32_t(2 * unit.octet_index) + half);
            ZK_UNROLL
            for (int j = 0; j < 4; ++j)
                kept |= uint32_t(words.w[j] < uint32_t(source.limit)) << (4 * half + j);
        }
    }
    return kept;
}

// A model's masked delta, times its ratio, and what it adds.
ZK_FN void load_delta(const DeltaBatch& batch, const DeltaOperand& operand,
                      const DeltaSource& source, const Unit& unit, const float* base, float* delta,
                      float* p) {
    const Storage type = batch.rules.rounded ? source.tensor.type : Storage::fp32;
    load_dense(source.tensor, unit, delta);
    if (operand.base.data != nullptr) {
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) delta[j] = delta[j] - base[j];
        round_octet(type, delta);
    }
    const uint32_t kept = kept_of(batch, operand, source, unit, delta);
    const float ratio = source.ratio == nullptr ? 1.0f : *source.ratio;
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) delta[j] = ratio * (kept >> j & 1u ? delta[j] : 0.0f);
    round_octet(type, delta);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) p[j] = source.weight * delta[j];
    round_octet(type, p);
}

// The sum of the models' votes.
ZK_FN void count_votes(const DeltaBatch& batch, const DeltaOperand& operand, const Unit& unit,
                       const float* base, float* elected) {
    const Votes votes = batch.rules.votes;
    for (int m = 0; m < batch.rules.models; ++m) {
        const DeltaSource& source = batch.sources[operand.first_source + m];
        float delta[8], p[8];
        load_delta(batch, operand, source, unit, base, delta, p);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const float vote = votes == Votes::weighted ? p[j] : delta[j];
            elected[j] = elected[j] + (votes == Votes::frequency ? sign_or_zero(vote) : vote);
        }
    }
}

// Of the votes for the elected signs; all where there was no election.
template <bool elects>
ZK_FN void combine(const DeltaBatch& batch, const DeltaOperand& operand, const Unit& unit,
                   const float* base, const float* sign, float* total) {
    const DeltaRules& rules = batch.rules;
    const bool weighted = rules.votes == Votes::weighted;
    float count[8] = {};
    for (int m = 0; m < rules.models; ++m) {
        const DeltaSource& source = batch.sources[operand.first_source + m];
        float delta[8], p[8];
        load_delta(batch, operand, source, unit, base, delta, p);
        const float one = weighted ? source.weight : 1.0f;
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            if constexpr (elects) {
                const float side = sign[j] * (weighted ? p[j] : delta[j]);
                total[j] = rules.combine == Combine::max ? largest_agreeing(total[j], side, p[j])
                                                         : total_agreeing(total[j], side, p[j]);
                count[j] = count_agreeing(count[j], side, one);
            } else {
                total[j] = total[j] + p[j];
            }
        }
    }
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        if (elects && rules.combine == Combine::max)
            total[j] = sign[j] * total[j];
        else if (elects && rules.combine == Combine::mean)
            total[j] = total[j] / (count[j] == 0.0f ? 1.0f : count[j]);
        else
            total[j] = total[j] / rules.divisor;
    }
}

ZK_FN void store_dense(const DeltaOperand& operand, const Unit& unit, const float* values) {
    if (operand.out_type == Storage::bf16)
        store_to<Storage::bf16>(operand.out, nullptr, unit, values);
    else if (operand.out_type == Storage::fp16)
        store_to<Storage::fp16>(operand.out, nullptr, unit, values);
    else
        store_to<Storage::fp32>(operand.out, nullptr, unit, values);
}

// An election looks at the deltas twice: they are computed twice, from what is then in a cache.
template <bool elects>
ZK_FN void merge_unit(const DeltaBatch& batch, const DeltaOperand& operand, const Unit& unit) {
    const DeltaRules& rules = batch.rules;
    float base[8] = {}, sign[8] = {}, total[8] = {};
    if (operand.base.data != nullptr) load_dense(operand.base, unit, base);
    if constexpr (elects) {
        count_votes(batch, operand, unit, base, sign);
        const bool plain = rules.combine == Combine::sign;
        ZK_UNROLL
        for (int j = 0; j < 8; ++j)
            sign[j] = plain ? sign_or_zero(sign[j]) : elected_sign(sign[j], rules.zero_up);
        if (plain) {
            store_dense(operand, unit, sign);
            return;
        }
    }
    combine<elects>(batch, operand, unit, base, sign, total);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        total[j] = rules.scale * total[j];
        if (operand.base.data != nullptr) total[j] = base[j] + total[j];
    }
    store_dense(operand, unit, total);
}

template <bool elects, class Context>
ZK_FN void delta_body(Context at, const DeltaBatch& batch) {
    const uint32_t which = find_operand(batch, at.block());
    const DeltaOperand& operand = batch.operands[which];
    const Share share = share_of(batch, which, at.block());
    for (uint64_t index = share.begin + at.thread(); index < share.end; index += kThreads)
        merge_unit<elects>(batch, operand, locate(operand, index));
}

}  // namespace zokern
