// The kernel of all other sweeps: along dense directions too, with masters, updates and stochastic
// rounding. The order of its work is that of ../sweep.h.
#pragma once

#include "context.h"
#include "unit.h"

namespace zokern {

template <Law law>
ZK_FN void load_direction(const UpdateBatch& batch, const UpdateOperand& operand, uint32_t k,
                          const Unit& unit, float* z) {
    if (batch.dense[k / 32] >> (k % 32) & 1u) {
        load_dense(operand.dense[~batch.draws[k]], unit, z);
    } else {
        const BatchStream stream = {batch.keys, operand.c1, operand.c2, batch.draws[k]};
        octet<law>(stream, unit.octet_index, z);
    }
}

// t, and where the sweep updates also u, along direction k.
ZK_FN void move_along(const UpdateBatch& batch, uint32_t factor_index, const float* z, float* t,
                      float* u) {
    const Factor factor = batch.factors[factor_index];
    if (factor.scale != 1.0f) {
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) t[j] = factor.scale * t[j];
    }
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) t[j] = fma32(factor.coeff, z[j], t[j]);
    if (batch.updates) {
        const float g = batch.gradient[factor_index];
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) u[j] = fma32(g, z[j], u[j]);
    }
}

ZK_FN float sign_of(float x) { return float(x > 0.0f) - float(x < 0.0f); }

// What happens at the place of rest.
template <bool masters>
ZK_FN void settle(const UpdateBatch& batch, const UpdateOperand& operand, const Unit& unit,
                  float* t, const float* u) {
    if (batch.updates) {
        if (operand.momentum != nullptr)
            store_to<Storage::fp32>(operand.momentum, nullptr, unit, u);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j)
            t[j] = fma32(operand.step, batch.sign ? sign_of(u[j]) : u[j], t[j]);
    }
    if constexpr (masters) {
        if (batch.rest > 0) store_to<Storage::fp32>(operand.master, nullptr, unit, t);
    }
}

// What a storage keeps, if the sweep rounds stochastically.
template <Storage storage>
ZK_FN void round_unit(const UpdateBatch& batch, const UpdateOperand& operand, const Unit& unit,
                      float* t) {
    if constexpr (rounds(storage)) {
        if (!batch.rounds) return;
        const uint32_t c2 = (operand.c2 & 0xFFFFFFu) | uint32_t(Law::rounding16) << 24;
        const BatchStream stream = {batch.keys, operand.c1, c2, batch.rounding};
        const Words words = group_words(stream, uint32_t(unit.octet_index));
        ZK_UNROLL
        for (int j = 0; j < 8; ++j)
            t[j] = round_by<storage>((words.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu, t[j]);
    }
}

template <Law law, Storage storage, bool masters>
ZK_FN void update_unit(const UpdateBatch& batch, const UpdateOperand& operand, uint64_t index) {
    const Unit unit = locate(operand, index, operand.picked);
    float t[8], u[8] = {};
    if constexpr (masters)
        load_from<Storage::fp32>(operand.master, nullptr, unit, t);
    else
        load_from<storage>(operand.param, operand.residual, unit, t);
    if (batch.updates && operand.momentum != nullptr) {
        load_from<Storage::fp32>(operand.momentum, nullptr, unit, u);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) u[j] = operand.decay * u[j];
    }
    for (uint32_t k = 0;; ++k) {
        if (k == batch.rest) settle<masters>(batch, operand, unit, t, u);
        if (k == batch.directions) break;
        float z[8];
        load_direction<law>(batch, operand, k, unit, z);
        // Behind the place of rest u is of no more use, and may change.
        move_along(batch, operand.first_factor + k, z, t, u);
    }
    if (operand.out == nullptr)
        round_unit<storage>(batch, operand, unit, t);
    else
        round_unit<alone(storage)>(batch, operand, unit, t);
    finish_unit<storage>(operand, unit, t);
}

template <Law law, Storage storage, bool masters, class Context>
ZK_FN void update_body(Context at, const UpdateBatch& batch) {
    const uint32_t which = find_operand(batch, at.block());
    const Share share = share_of(batch, which, at.block());
    for (uint64_t index = share.begin + at.thread(); index < share.end; index += kThreads)
        update_unit<law, storage, masters>(batch, batch.operands[which], index);
}

}  // namespace zokern
