// Merges models over a base, through blocks whose deltas stay in the cache.
#pragma once

#include "../deltas.h"
#include "values.h"

namespace zokern {
namespace {

constexpr int64_t kDeltaBlock = 1024;

struct alignas(64) DeltaRow {
    float values[kDeltaBlock];
};

// Elements [i, i + n) of an output.
void store_dense(void* out, Storage type, int64_t i, int64_t n, const float* values) {
    SweepTensor as_param{};
    as_param.param = out;
    switch (type) {
        case Storage::bf16:
            return store_block<Storage::bf16>(as_param, i, n, values);
        case Storage::fp16:
            return store_block<Storage::fp16>(as_param, i, n, values);
        default:
            return store_block<Storage::fp32>(as_param, i, n, values);
    }
}

// A model's masked delta, times its ratio. Each step has a row of its own to write to: loops whose
// rows may be one are not made vectors of.
void load_delta(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource& source,
                const float* base, int64_t i, int64_t n, float* delta) {
    DeltaRow loaded, difference;
    const Storage type = rules.rounded ? source.tensor.type : Storage::fp32;
    const float* values = floats_of(source.tensor, i, n, loaded.values);
    if (base != nullptr) {
        for (int64_t j = 0; j < n; ++j) difference.values[j] = values[j] - base[j];
        round_to(type, difference.values, n);
        values = difference.values;
    }
    const float ratio = source.ratio == nullptr ? 1.0f : *source.ratio;
    const int64_t draw = source.draw, limit = int64_t(source.limit);
    if (source.threshold == nullptr && limit >> 32 != 0) {
        for (int64_t j = 0; j < n; ++j) delta[j] = ratio * values[j];
    } else {
        MaskTensor mask{};
        mask.threshold = source.threshold;
        mask.cut = source.cut;
        mask.draw = &draw;
        mask.limit = &limit;
        mask.tensor_id = tensor.tensor_id;
        keep(mask, rules.seed, i, n, i, values, delta);
        for (int64_t j = 0; j < n; ++j) delta[j] = ratio * delta[j];
    }
    if (ratio != 1.0f) round_to(type, delta, n);
}

// p of a model's delta.
void weigh(const DeltaRules& rules, const DeltaSource& source, const float* delta, int64_t n,
           float* p) {
    for (int64_t j = 0; j < n; ++j) p[j] = source.weight * delta[j];
    if (rules.rounded) round_to(source.tensor.type, p, n);
}

// The elected sign of each element: +1 or -1, or for Combine::sign also 0.
void elect(const DeltaRules& rules, const DeltaSource* sources, const DeltaRow* deltas, int64_t n,
           float* sign) {
    DeltaRow p;
    for (int64_t j = 0; j < n; ++j) sign[j] = 0.0f;
    for (int m = 0; m < rules.models; ++m) {
        const float* vote = deltas[m].values;
        if (rules.votes == Votes::frequency) {
            for (int64_t j = 0; j < n; ++j) sign[j] = sign[j] + sign_or_zero(vote[j]);
            continue;
        }
        if (rules.votes == Votes::weighted) {
            weigh(rules, sources[m], vote, n, p.values);
            vote = p.values;
        }
        for (int64_t j = 0; j < n; ++j) sign[j] = sign[j] + vote[j];
    }
    if (rules.combine == Combine::sign) {
        for (int64_t j = 0; j < n; ++j) sign[j] = sign_or_zero(sign[j]);
    } else {
        const bool zero_up = rules.zero_up;
        for (int64_t j = 0; j < n; ++j) sign[j] = elected_sign(sign[j], zero_up);
    }
}

// What the models whose vote agrees with the elected sign add up to.
void combine_elected(const DeltaRules& rules, const DeltaSource* sources, const DeltaRow* deltas,
                     const float* sign, int64_t n, float* total) {
    DeltaRow p, side, count;
    for (int64_t j = 0; j < n; ++j) total[j] = count.values[j] = 0.0f;
    for (int m = 0; m < rules.models; ++m) {
        weigh(rules, sources[m], deltas[m].values, n, p.values);
        const bool weighted = rules.votes == Votes::weighted;
        const float* vote = weighted ? p.values : deltas[m].values;
        const float one = weighted ? sources[m].weight : 1.0f;
        for (int64_t j = 0; j < n; ++j) side.values[j] = sign[j] * vote[j];
        if (rules.combine == Combine::max) {
            for (int64_t j = 0; j < n; ++j)
                total[j] = largest_agreeing(total[j], side.values[j], p.values[j]);
            continue;
        }
        for (int64_t j = 0; j < n; ++j)
            total[j] = add_agreeing(total[j], side.values[j], p.values[j]);
        if (rules.combine == Combine::mean) {
            for (int64_t j = 0; j < n; ++j)
                count.values[j] = count_agreeing(count.values[j], side.values[j], one);
        }
    }
    if (rules.combine == Combine::max) {
        for (int64_t j = 0; j < n; ++j) total[j] = sign[j] * total[j];
    } else if (rules.combine == Combine::mean) {
        for (int64_t j = 0; j < n; ++j) {
            const float divisor = count.values[j] == 0.0f ? 1.0f : count.values[j];
            total[j] = total[j] / divisor;
        }
    } else {
        for (int64_t j = 0; j < n; ++j) total[j] = total[j] / rules.divisor;
    }
}

void add_all(const DeltaRules& rules, const DeltaSource& source, const float* delta, int64_t n,
             float* total) {
    DeltaRow p;
    weigh(rules, source, delta, n, p.values);
    for (int64_t j = 0; j < n; ++j) total[j] = total[j] + p.values[j];
}

void merge_block(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource* sources,
                 DeltaRow* deltas, int64_t i, int64_t n) {
    DeltaRow bases, total, sign;
    const float* base =
        tensor.base.data == nullptr ? nullptr : floats_of(tensor.base, i, n, bases.values);
    if (rules.votes == Votes::none) {
        for (int64_t j = 0; j < n; ++j) total.values[j] = 0.0f;
        for (int m = 0; m < rules.models; ++m) {
            load_delta(rules, tensor, sources[m], base, i, n, deltas->values);
            add_all(rules, sources[m], deltas->values, n, total.values);
        }
        for (int64_t j = 0; j < n; ++j) total.values[j] = total.values[j] / rules.divisor;
    } else {
        for (int m = 0; m < rules.models; ++m)
            load_delta(rules, tensor, sources[m], base, i, n, deltas[m].values);
        elect(rules, sources, deltas, n, sign.values);
        if (rules.combine == Combine::sign)
            return store_dense(tensor.out, tensor.out_type, i, n, sign.values);
        combine_elected(rules, sources, deltas, sign.values, n, total.values);
    }
    const float scale = rules.scale;
    for (int64_t j = 0; j < n; ++j) total.values[j] = scale * total.values[j];
    if (base != nullptr) {
        for (int64_t j = 0; j < n; ++j) total.values[j] = base[j] + total.values[j];
    }
    store_dense(tensor.out, tensor.out_type, i, n, total.values);
}

void merge_deltas(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource* sources,
                  int64_t begin, int64_t end) {
    DeltaRow deltas[kMaxModels];
    for (int64_t i = begin; i < end; i += kDeltaBlock) {
        const int64_t n = end - i < kDeltaBlock ? end - i : kDeltaBlock;
        merge_block(rules, tensor, sources, deltas, i, n);
    }
}

}  // namespace
}  // namespace zokern
