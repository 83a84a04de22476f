// Merges models over a base, through blocks whose deltas stay in the cache.
//
// Loops take what they need from structs beforehand, and write to rows of their own: only then do
// compilers make vectors of them.
#pragma once

#include "../deltas.h"
#include "masks.h"
#include "values.h"

namespace zokern {
namespace {

// So short that a processor works on several at once, and no model's stream of memory rests long.
constexpr int64_t kDeltaBlock = 128;

struct alignas(64) DeltaRow {
    float values[kDeltaBlock];
};

// A block of a model: its vote is vote_factor · vote, what it adds p_factor · p.
struct Ballot {
    const float *vote, *p;
    float vote_factor, p_factor;
};

// A model's masked delta, times its ratio.
void load_delta(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource& source,
                const float* base, int64_t i, int64_t n, float* delta) {
    DeltaRow loaded, difference;
    const bool masks = source.threshold != nullptr || source.limit >> 32 == 0;
    const float ratio = source.ratio == nullptr ? 1.0f : *source.ratio;
    const Storage type = rules.rounded ? source.tensor.type : Storage::fp32;
    const float* values = floats_of(source.tensor, i, n, loaded.values);
    if (base != nullptr && !masks && type == Storage::fp32) {
        for (int64_t j = 0; j < n; ++j) delta[j] = ratio * (values[j] - base[j]);
        return;
    }
    if (base != nullptr) {
        for (int64_t j = 0; j < n; ++j) difference.values[j] = values[j] - base[j];
        round_to(type, difference.values, n);
        values = difference.values;
    }
    if (masks) {
        const int64_t draw = source.draw, limit = int64_t(source.limit);
        MaskTensor mask{};
        mask.threshold = source.threshold;
        mask.cut = source.cut;
        mask.draw = &draw;
        mask.limit = &limit;
        mask.tensor_id = tensor.tensor_id;
        keep(mask, rules.seed, i, n, i, values, delta);
    } else {
        for (int64_t j = 0; j < n; ++j) delta[j] = values[j];
    }
    if (ratio != 1.0f) {
        for (int64_t j = 0; j < n; ++j) delta[j] = ratio * delta[j];
        round_to(type, delta, n);
    }
}

// The ballot of a delta; its rounded p, if it is rounded, lies in the row.
Ballot ballot_of(const DeltaRules& rules, const DeltaSource& source, const float* delta, int64_t n,
                 float* p) {
    const float weight = source.weight;
    const bool weighted = rules.votes == Votes::weighted;
    if (!rules.rounded || source.tensor.type == Storage::fp32)
        return {delta, delta, weighted ? weight : 1.0f, weight};
    for (int64_t j = 0; j < n; ++j) p[j] = weight * delta[j];
    round_to(source.tensor.type, p, n);
    return {weighted ? p : delta, p, 1.0f, 1.0f};
}

void add_votes(const Ballot& ballot, bool frequency, int64_t n, float* elected) {
    const float* vote = ballot.vote;
    const float factor = ballot.vote_factor;
    if (frequency) {
        for (int64_t j = 0; j < n; ++j) elected[j] = elected[j] + sign_or_zero(vote[j]);
    } else {
        for (int64_t j = 0; j < n; ++j) elected[j] = elected[j] + factor * vote[j];
    }
}

// Of the votes for the elected sign. `one` is what such a vote counts.
void add_agreeing(const Ballot& ballot, Combine combine, float one, const float* sign, int64_t n,
                  float* total, float* count) {
    const float *vote = ballot.vote, *p = ballot.p;
    const float vote_factor = ballot.vote_factor, p_factor = ballot.p_factor;
    if (combine == Combine::max) {
        for (int64_t j = 0; j < n; ++j)
            total[j] =
                largest_agreeing(total[j], sign[j] * (vote_factor * vote[j]), p_factor * p[j]);
    } else if (combine == Combine::mean) {
        for (int64_t j = 0; j < n; ++j) {
            const float side = sign[j] * (vote_factor * vote[j]);
            total[j] = total_agreeing(total[j], side, p_factor * p[j]);
            count[j] = count_agreeing(count[j], side, one);
        }
    } else {
        for (int64_t j = 0; j < n; ++j)
            total[j] = total_agreeing(total[j], sign[j] * (vote_factor * vote[j]), p_factor * p[j]);
    }
}

// What the models add up to by an election.
void combine_votes(const DeltaRules& rules, const DeltaSource* sources, const Ballot* ballots,
                   int64_t n, float* total) {
    DeltaRow signs, counts;
    float *sign = signs.values, *count = counts.values;
    zero(sign, 0, n);
    for (int m = 0; m < rules.models; ++m)
        add_votes(ballots[m], rules.votes == Votes::frequency, n, sign);
    if (rules.combine == Combine::sign) {
        for (int64_t j = 0; j < n; ++j) total[j] = sign_or_zero(sign[j]);
        return;
    }
    const bool zero_up = rules.zero_up;
    for (int64_t j = 0; j < n; ++j) sign[j] = elected_sign(sign[j], zero_up);
    zero(total, 0, n);
    zero(count, 0, n);
    for (int m = 0; m < rules.models; ++m) {
        const float one = rules.votes == Votes::weighted ? sources[m].weight : 1.0f;
        add_agreeing(ballots[m], rules.combine, one, sign, n, total, count);
    }
    if (rules.combine == Combine::max) {
        for (int64_t j = 0; j < n; ++j) total[j] = sign[j] * total[j];
    } else if (rules.combine == Combine::mean) {
        for (int64_t j = 0; j < n; ++j) total[j] = total[j] / (count[j] == 0.0f ? 1.0f : count[j]);
    }
}

void write_merged(const DeltaRules& rules, const DeltaTensor& tensor, const float* base, int64_t i,
                  int64_t n, float* total) {
    const float scale = rules.scale, divisor = rules.divisor;
    if (rules.combine == Combine::sum && divisor != 1.0f) {
        for (int64_t j = 0; j < n; ++j) total[j] = total[j] / divisor;
    }
    if (rules.combine == Combine::sign) {
        store_dense(tensor.out, tensor.out_type, i, n, total);
        return;
    }
    const bool direct = tensor.out_type == Storage::fp32;
    float* out = direct ? static_cast<float*>(tensor.out) + i : total;
    if (base == nullptr) {
        for (int64_t j = 0; j < n; ++j) out[j] = scale * total[j];
    } else {
        for (int64_t j = 0; j < n; ++j) out[j] = base[j] + scale * total[j];
    }
    if (!direct) store_dense(tensor.out, tensor.out_type, i, n, total);
}

// Whether what a model adds is its tensor's own float32 values, or their distance to the base,
// times its weight.
bool is_plain(const DeltaSource& source) {
    return source.tensor.type == Storage::fp32 && source.threshold == nullptr &&
           source.limit >> 32 != 0 && (source.ratio == nullptr || *source.ratio == 1.0f);
}

void add_plain(const DeltaSource& source, const float* base, int64_t i, int64_t n, float* total) {
    const float* values = static_cast<const float*>(source.tensor.data) + i;
    const float weight = source.weight;
    if (base == nullptr) {
        for (int64_t j = 0; j < n; ++j) total[j] = total[j] + weight * values[j];
    } else {
        for (int64_t j = 0; j < n; ++j) total[j] = total[j] + weight * (values[j] - base[j]);
    }
}

// The rows hold the deltas of all models, then what they add.
void merge_block(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource* sources,
                 DeltaRow* rows, int64_t i, int64_t n) {
    DeltaRow bases, totals;
    Ballot ballots[kMaxModels];
    float* total = totals.values;
    const float* base =
        tensor.base.data == nullptr ? nullptr : floats_of(tensor.base, i, n, bases.values);
    const bool elects = rules.votes != Votes::none;
    zero(total, 0, n);
    for (int m = 0; m < rules.models; ++m) {
        if (!elects && is_plain(sources[m])) {
            add_plain(sources[m], base, i, n, total);
            continue;
        }
        float* delta = rows[elects ? m : 0].values;
        float* p = rows[kMaxModels + (elects ? m : 0)].values;
        load_delta(rules, tensor, sources[m], base, i, n, delta);
        ballots[m] = ballot_of(rules, sources[m], delta, n, p);
        if (!elects) {
            const float* added = ballots[m].p;
            const float factor = ballots[m].p_factor;
            for (int64_t j = 0; j < n; ++j) total[j] = total[j] + factor * added[j];
        }
    }
    if (elects) combine_votes(rules, sources, ballots, n, total);
    write_merged(rules, tensor, base, i, n, total);
}

void merge_deltas(const DeltaRules& rules, const DeltaTensor& tensor, const DeltaSource* sources,
                  int64_t begin, int64_t end) {
    DeltaRow rows[2 * kMaxModels];
    for (int64_t i = begin; i < end; i += kDeltaBlock) {
        const int64_t n = end - i < kDeltaBlock ? end - i : kDeltaBlock;
        merge_block(rules, tensor, sources, rows, i, n);
    }
}

}  // namespace
}  // namespace zokern
