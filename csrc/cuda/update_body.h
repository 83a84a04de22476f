// The kernel of all other sweeps: along dense directions too, with masters, updates and stochastic
// rounding. The order of its work is that of ../sweep.h.
#pragma once

#include "context.h"
#include "displace.h"

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

// In a parameter and its residual, if it has one.
template <Storage storage, int octets>
ZK_FN void store_rounded(const UpdateBatch& batch, const UpdateOperand& operand, void* param,
                         void* residual, const Unit* units, const float (&t)[octets][8]) {
    if constexpr (rounds(storage)) {
        if (batch.rounds) {
            const uint32_t c2 = (operand.c2 & 0xFFFFFFu) | uint32_t(Law::rounding16) << 24;
            const BatchStream stream = {batch.keys, operand.c1, c2, batch.rounding};
            ZK_UNROLL
            for (int i = 0; i < octets; ++i) {
                const Words words = group_words(stream, uint32_t(units[i].octet_index));
                store_octet(param, residual, units[i], encode_rounded<storage>(words, t[i]));
            }
            return;
        }
    }
    ZK_UNROLL
    for (int i = 0; i < octets; ++i) store_to<storage>(param, residual, units[i], t[i]);
}

template <Storage storage, int octets>
ZK_FN void finish_units(const UpdateBatch& batch, const UpdateOperand& operand, const Unit* units,
                        const float (&t)[octets][8]) {
    if (operand.out == nullptr)
        store_rounded<storage>(batch, operand, operand.param, operand.residual, units, t);
    else
        store_rounded<alone(storage)>(batch, operand, operand.out, nullptr, units, t);
}

template <Storage storage, bool masters, int octets>
ZK_FN void load_units(const UpdateOperand& operand, const Unit* units, float (&t)[octets][8]) {
    ZK_UNROLL
    for (int i = 0; i < octets; ++i) {
        if constexpr (masters)
            load_from<Storage::fp32>(operand.master, nullptr, units[i], t[i]);
        else
            load_from<storage>(operand.param, operand.residual, units[i], t[i]);
    }
}

template <Law law, Storage storage, bool masters>
ZK_FN void update_unit(const UpdateBatch& batch, const UpdateOperand& operand, const Unit& unit) {
    float t[1][8], u[8] = {};
    load_units<storage, masters>(operand, &unit, t);
    if (batch.updates && operand.momentum != nullptr) {
        load_from<Storage::fp32>(operand.momentum, nullptr, unit, u);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) u[j] = operand.decay * u[j];
    }
    for (uint32_t k = 0;; ++k) {
        if (k == batch.rest) settle<masters>(batch, operand, unit, t[0], u);
        if (k == batch.directions) break;
        float z[8];
        load_direction<law>(batch, operand, k, unit, z);
        // Behind the place of rest u is of no more use, and may change.
        move_along(batch, operand.first_factor + k, z, t[0], u);
    }
    finish_units<storage>(batch, operand, &unit, t);
}

// What update_unit does where the batch only moves, along one direction, and nothing is scaled.
template <Law law, Storage storage, bool masters, int octets>
ZK_FN void move_units(const UpdateBatch& batch, const UpdateOperand& operand, const Unit* units) {
    float t[octets][8];
    load_units<storage, masters>(operand, units, t);
    displace<law, 1, false>(batch, operand, units[0].octet_index, t);
    if constexpr (masters) {
        if (batch.rest > 0) {
            ZK_UNROLL
            for (int i = 0; i < octets; ++i)
                store_to<Storage::fp32>(operand.master, nullptr, units[i], t[i]);
        }
    }
    finish_units<storage>(batch, operand, units, t);
}

// A block's full octets on vector boundaries, in a tensor of one row, from a thread's first on;
// `run` takes as many as are in flight.
template <int in_flight, class F>
ZK_FN void for_whole(const UpdateBatch& batch, const UpdateOperand& operand, uint64_t index,
                     const F& run) {
    for (uint32_t step = 0; step < batch.steps; step += in_flight) {
        Unit units[in_flight];
        ZK_UNROLL
        for (int i = 0; i < in_flight; ++i) {
            const uint64_t unit = index + uint64_t(step + i) * kThreads;
            units[i] = {operand.offset / 8 + unit, int64_t(8 * unit - operand.offset % 8), 0xFFu,
                        true};
        }
        run(units);
    }
}

template <Law law, Storage storage, bool masters>
ZK_FN void update_whole(const UpdateBatch& batch, const UpdateOperand& operand, uint64_t index) {
    // The code of `normal` is long, and takes its time to compile.
    constexpr int octets = law == Law::normal ? 1 : 2;
    if (batch.moves && !batch.scaled && batch.directions == 1)
        for_whole<octets>(batch, operand, index, [&](const Unit* units) {
            move_units<law, storage, masters, octets>(batch, operand, units);
        });
    else
        for_whole<1>(batch, operand, index, [&](const Unit* units) {
            update_unit<law, storage, masters>(batch, operand, units[0]);
        });
}

template <Law law, Storage storage, bool masters, class Context>
ZK_FN void update_body(Context at, const UpdateBatch& batch) {
    const uint32_t which = find_operand(batch, at.block());
    const UpdateOperand& operand = batch.operands[which];
    const Share share = share_of(batch, which, at.block());
    if (is_whole(operand, share.begin, uint64_t(batch.steps) * kThreads)) {
        update_whole<law, storage, masters>(batch, operand, share.begin + at.thread());
        return;
    }
    for (uint64_t index = share.begin + at.thread(); index < share.end; index += kThreads) {
        const Unit unit = locate(operand, index, operand.picked);
        update_unit<law, storage, masters>(batch, operand, unit);
    }
}

}  // namespace zokern
