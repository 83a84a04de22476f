// The kernel of sweeps that only move along noise.
#pragma once

#include "context.h"
#include "displace.h"

namespace zokern {

// Full octets on vector boundaries, in a tensor of one row. `apart`: they go to the operand's
// `out`.
template <Law law, Storage storage, int K, bool scaled, bool apart>
ZK_FN void sweep_whole(const SweepBatch& batch, const Operand& operand, uint64_t unit) {
    constexpr int pbytes = param_bytes(storage), rbytes = residual_bytes(storage);
    constexpr int in_flight = 2;
    const uint64_t first = 8 * unit - operand.offset % 8;
    char* param = operand.param + first * pbytes;
    char* residual = operand.residual + first * rbytes;
    [[maybe_unused]] char* out = operand.out + first * pbytes;
    uint64_t octet_index = operand.offset / 8 + unit;
    for (uint32_t step = 0; step < batch.steps; step += in_flight) {
        float values[in_flight][8];
        ZK_UNROLL
        for (int i = 0; i < in_flight; ++i) {
            StoredOctet<storage> stored;
            stored.param = load_vectors<pbytes>(param + i * 8 * kThreads * pbytes);
            if constexpr (rbytes > 0)
                stored.residual = load_vectors<rbytes>(residual + i * 8 * kThreads * rbytes);
            decode(stored, values[i]);
        }
        displace<law, K, scaled>(batch, operand, octet_index, values);
        ZK_UNROLL
        for (int i = 0; i < in_flight; ++i) {
            constexpr Storage kept = apart ? alone(storage) : storage;
            const StoredOctet<kept> stored = encode<kept>(values[i]);
            store_vectors<pbytes>((apart ? out : param) + i * 8 * kThreads * pbytes, stored.param);
            if constexpr (residual_bytes(kept) > 0)
                store_vectors<rbytes>(residual + i * 8 * kThreads * rbytes, stored.residual);
        }
        if constexpr (apart) out += in_flight * 8 * kThreads * pbytes;
        param += in_flight * 8 * kThreads * pbytes;
        residual += in_flight * 8 * kThreads * rbytes;
        octet_index += in_flight * kThreads;
    }
}

// One octet of any tensor; its elements outside the row are left alone.
template <Law law, Storage storage>
ZK_FN void sweep_unit(const SweepBatch& batch, const Operand& operand, uint64_t index) {
    const Unit unit = locate(operand, index, operand.picked);
    float values[1][8];
    load_from<storage>(operand.param, operand.residual, unit, values[0]);
    displace<law, 0, true>(batch, operand, unit.octet_index, values);
    finish_unit<storage>(operand, unit, values[0]);
}

template <Law law, Storage storage, int K, class Context>
ZK_FN void sweep_body(Context at, const SweepBatch& batch) {
    const uint32_t which = find_operand(batch, at.block());
    const Operand& operand = batch.operands[which];
    const uint64_t per_block = uint64_t(batch.steps) * kThreads;
    const uint64_t begin = (at.block() - batch.first_blocks[which]) * per_block;
    const bool apart = operand.out != nullptr;
    // What is read at rest is not scaled: scaled sweeps out of place have no code of their own.
    if (is_whole(operand, begin, per_block) && !(apart && batch.scaled)) {
        const uint64_t unit = begin + at.thread();
        if (apart)
            sweep_whole<law, storage, K, false, true>(batch, operand, unit);
        else if (batch.scaled)
            sweep_whole<law, storage, K, true, false>(batch, operand, unit);
        else
            sweep_whole<law, storage, K, false, false>(batch, operand, unit);
    } else {
        const uint64_t units = units_of(operand);
        const uint64_t end = begin + per_block < units ? begin + per_block : units;
        for (uint64_t index = begin + at.thread(); index < end; index += kThreads)
            sweep_unit<law, storage>(batch, operand, index);
    }
}

}  // namespace zokern
