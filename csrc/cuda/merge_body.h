// The kernel of a merging optimizer's step: a thread takes octets, and all methods one kernel,
// whose branches by method and by type are the same for all threads of a block.
#pragma once

#include "../merge_element.h"
#include "../sparse_tau.h"
#include "context.h"
#include "unit.h"
#include "value_body.h"

namespace zokern {

// A tensor's entries in the tables, which lie on the device.
struct MergeRow {
    AdamNumbers numbers;
    bool merges;
    uint32_t threshold;  // as a magnitude
    int64_t cut;
    uint32_t draw;
    int64_t limit;
};

ZK_FN bool masks_by_magnitude(Method method) {
    return method == Method::ties || method == Method::ties_paper;
}

// The pull of ema is not put off.
ZK_FN MergeRow read_row(const MergeTensor& t, Method method) {
    const bool by_magnitude = masks_by_magnitude(method);
    return {*t.adam.numbers,
            method == Method::ema || *t.adam.merges != 0,
            by_magnitude ? magnitude(*t.mask.threshold) : 0,
            by_magnitude ? *t.mask.cut : 0,
            uint32_t(*t.mask.draw),
            *t.mask.limit};
}

ZK_FN void store_dense(const DenseTensor& dense, const Unit& unit, const float* values) {
    void* const data = const_cast<void*>(dense.data);
    if (dense.type == Storage::bf16)
        store_to<Storage::bf16>(data, nullptr, unit, values);
    else if (dense.type == Storage::fp16)
        store_to<Storage::fp16>(data, nullptr, unit, values);
    else
        store_to<Storage::fp32>(data, nullptr, unit, values);
}

// An octet may lie in two buckets.
ZK_FN void load_sparse(const TauTensor& tau, const Unit& unit, float* values) {
    if (unit.mask == 0) return;
    int64_t i = unit.first + 31 - leading_zeros(unit.mask & (0u - unit.mask));
    const int64_t end = unit.first + 32 - leading_zeros(unit.mask);
    while (i < end) {
        const int64_t bucket = i / kBucket, first = bucket * kBucket;
        const int64_t stop = end < first + kBucket ? end : first + kBucket;
        const int64_t last = tau.starts[bucket + 1];
        int64_t k = find_place(tau, tau.starts[bucket], last, uint32_t(i - first));
        for (; k < last && first + tau.places[k] < stop; ++k) {
            const int place = int(first + tau.places[k] - unit.first);
            const float value = sparse_value(tau.values, k);
            // Selects, not an indexed array, which would be local memory.
            ZK_UNROLL
            for (int j = 0; j < 8; ++j) values[j] = j == place ? value : values[j];
        }
        i = stop;
    }
}

// Where there is no τ it stays 0.
ZK_FN void load_tau(const TauTensor& tau, const Unit& unit, float* values) {
    if (tau.values.data == nullptr) return;
    if (tau.starts == nullptr)
        load_dense(tau.values, unit, values);
    else
        load_sparse(tau, unit, values);
}

// Takes 0 for what the mask does not keep.
ZK_FN void drop_at_random(const MergeBatch& batch, const MergeOperand& operand, uint32_t draw,
                          int64_t limit, const Unit& unit, float* values) {
    if (limit >= int64_t(1) << 32) return;
    const BatchStream stream = {batch.keys, operand.c1, operand.c2, draw};
    ZK_UNROLL
    for (uint32_t half = 0; half < 2; ++half) {
        const Words words = group_words(stream, 2 * uint32_t(unit.octet_index) + half);
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
            float& value = values[4 * half + j];
            value = words.w[j] < uint32_t(limit) ? value : 0.0f;
        }
    }
}

ZK_FN void drop_by_magnitude(const MergeRow& row, const Unit& unit, float* values) {
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        const uint32_t size = magnitude(values[j]);
        const bool tie = size == row.threshold && unit.first + j < row.cut;
        values[j] = size > row.threshold || tie ? values[j] : 0.0f;
    }
}

ZK_FN void mask(const MergeBatch& batch, const MergeOperand& operand, const MergeRow& row,
                const Unit& unit, float* tau, float* delta) {
    if (batch.method == Method::ema) return;
    if (masks_by_magnitude(batch.method))
        drop_by_magnitude(row, unit, delta);
    else
        drop_at_random(batch, operand, row.draw, row.limit, unit, delta);
    if (batch.method == Method::dare_paper)
        drop_at_random(batch, operand, row.draw + kTauDraws, row.limit, unit, tau);
}

template <Method method>
ZK_FN void merge_octet(const AdamNumbers& n, const float* cached, const float* tau,
                       const float* delta, float* values) {
    ZK_UNROLL
    for (int j = 0; j < 8; ++j)
        values[j] = merged<method>(n, values[j], cached[j], tau[j], delta[j]);
}

ZK_FN void merge_octet(Method method, const AdamNumbers& n, const float* cached, const float* tau,
                       const float* delta, float* values) {
    switch (method) {
        case Method::dare:
        case Method::dare_paper:
            return merge_octet<Method::dare>(n, cached, tau, delta, values);
        case Method::ties:
            return merge_octet<Method::ties>(n, cached, tau, delta, values);
        case Method::ties_paper:
            return merge_octet<Method::ties_paper>(n, cached, tau, delta, values);
        case Method::ema:
            return merge_octet<Method::ema>(n, cached, tau, delta, values);
    }
}

// The new moments, and Δ without what is cached.
ZK_FN void adam_octet(const AdamTensor& adam, const AdamNumbers& n, const Unit& unit,
                      float* delta) {
    float first[8], second[8];
    load_moments(adam, n, unit, first, second);
    store_dense(adam.exp_avg, unit, first);
    store_dense(adam.exp_avg_sq, unit, second);
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) delta[j] = adam_delta(n, {first[j], second[j]});
}

template <Storage storage, bool masters>
ZK_FN void merge_unit(const MergeBatch& batch, const MergeOperand& operand, const MergeRow& row,
                      uint64_t index) {
    const MergeTensor& t = operand.tensor;
    const Unit unit = locate(operand, index);
    float values[8], tau[8] = {}, cached[8] = {}, delta[8];
    // All that is read is on its way before the first of it is waited for.
    if constexpr (masters)
        load_from<Storage::fp32>(t.master, nullptr, unit, values);
    else
        load_from<storage>(t.param, t.residual, unit, values);
    if (t.adam.cached != nullptr) load_from<Storage::fp32>(t.adam.cached, nullptr, unit, cached);
    if (row.merges) load_tau(t.tau, unit, tau);
    adam_octet(t.adam, row.numbers, unit, delta);

    if (row.merges) {
        if (t.adam.cached != nullptr) {
            ZK_UNROLL
            for (int j = 0; j < 8; ++j) delta[j] = delta[j] + cached[j];
        }
        mask(batch, operand, row, unit, tau, delta);
        merge_octet(batch.method, row.numbers, cached, tau, delta, values);
    } else {
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) values[j] = decayed(row.numbers, values[j] + delta[j]);
    }
    if (t.adam.cached != nullptr) {
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) cached[j] = row.merges ? 0.0f : cached[j] + delta[j];
        store_to<Storage::fp32>(const_cast<float*>(t.adam.cached), nullptr, unit, cached);
    }
    if constexpr (masters) store_to<Storage::fp32>(t.master, nullptr, unit, values);
    store_to<storage>(t.param, t.residual, unit, values);
}

template <Storage storage, bool masters, class Context>
ZK_FN void merge_body(Context at, const MergeBatch& batch) {
    const uint32_t which = find_operand(batch, at.block());
    const MergeOperand& operand = batch.operands[which];
    const MergeRow row = read_row(operand.tensor, batch.method);
    const Share share = share_of(batch, which, at.block());
    for (uint64_t index = share.begin + at.thread(); index < share.end; index += kThreads)
        merge_unit<storage, masters>(batch, operand, row, index);
}

}  // namespace zokern
