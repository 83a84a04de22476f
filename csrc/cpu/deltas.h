// Merges models over a base, through blocks whose deltas stay in the cache. Included behind
// driver.h, of whose blocks, words and storages it makes use.
#pragma once

#include "../deltas.h"
#include "kernels.h"

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

// The n values as they are once they have been kept in that type.
void round_to(Storage type, int64_t n, float* values) {
    if (type == Storage::fp32) return;
    uint16_t kept[kDeltaBlock];
    store_dense(kept, type, 0, n, values);
    load_dense({kept, type}, 0, n, values);
}

void keep_largest(const DeltaSource& source, int64_t i, int64_t n, float* delta) {
    const uint32_t threshold = float_bits(*source.threshold) & 0x7FFFFFFFu;
    const int64_t left = *source.cut - i;
    const int64_t before_cut = left < 0 ? 0 : left < n ? left : n;
    for (int64_t j = 0; j < before_cut; ++j)
        delta[j] = is_kept(delta[j], threshold, true) ? delta[j] : 0.0f;
    for (int64_t j = before_cut; j < n; ++j)
        delta[j] = is_kept(delta[j], threshold, false) ? delta[j] : 0.0f;
}

void keep_at_random(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource& source,
                    int64_t i, int64_t n, float* delta) {
    // Whole groups of four words, 16 of them at a time.
    uint32_t buffer[kDeltaBlock + 64];
    const Stream stream = make_stream(rules.seed, tensor.tensor_id, source.draw, Law::uniform32);
    const int64_t lead = i % 4;
    store_words(stream, uint32_t(i / 4), (lead + n + 63) / 64 * 16, buffer);
    const uint32_t* words = buffer + lead;
    const uint32_t limit = uint32_t(source.limit);
    for (int64_t j = 0; j < n; ++j) delta[j] = words[j] < limit ? delta[j] : 0.0f;
}

// A model's masked delta, times its ratio.
void load_delta(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource& source,
                const float* base, int64_t i, int64_t n, float* delta) {
    const Storage type = rules.rounded ? source.tensor.type : Storage::fp32;
    load_dense(source.tensor, i, n, delta);
    if (tensor.base.data != nullptr) {
        for (int64_t j = 0; j < n; ++j) delta[j] = delta[j] - base[j];
        round_to(type, n, delta);
    }
    if (source.threshold != nullptr) {
        keep_largest(source, i, n, delta);
    } else if (source.limit >> 32 == 0) {
        keep_at_random(rules, tensor, source, i, n, delta);
    }
    if (source.ratio != nullptr && *source.ratio != 1.0f) {
        const float ratio = *source.ratio;
        for (int64_t j = 0; j < n; ++j) delta[j] = ratio * delta[j];
        round_to(type, n, delta);
    }
}

// p of a model's delta.
void weigh(const DeltaRules& rules, const DeltaSource& source, const float* delta, int64_t n,
           float* p) {
    for (int64_t j = 0; j < n; ++j) p[j] = source.weight * delta[j];
    if (rules.rounded) round_to(source.tensor.type, n, p);
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
    DeltaRow base, total, sign;
    if (tensor.base.data != nullptr) load_dense(tensor.base, i, n, base.values);
    if (rules.votes == Votes::none) {
        for (int64_t j = 0; j < n; ++j) total.values[j] = 0.0f;
        for (int m = 0; m < rules.models; ++m) {
            load_delta(rules, tensor, sources[m], base.values, i, n, deltas->values);
            add_all(rules, sources[m], deltas->values, n, total.values);
        }
        for (int64_t j = 0; j < n; ++j) total.values[j] = total.values[j] / rules.divisor;
    } else {
        for (int m = 0; m < rules.models; ++m)
            load_delta(rules, tensor, sources[m], base.values, i, n, deltas[m].values);
        elect(rules, sources, deltas, n, sign.values);
        if (rules.combine == Combine::sign)
            return store_dense(tensor.out, tensor.out_type, i, n, sign.values);
        combine_elected(rules, sources, deltas, sign.values, n, total.values);
    }
    const float scale = rules.scale;
    for (int64_t j = 0; j < n; ++j) total.values[j] = scale * total.values[j];
    if (tensor.base.data != nullptr) {
        for (int64_t j = 0; j < n; ++j) total.values[j] = base.values[j] + total.values[j];
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
