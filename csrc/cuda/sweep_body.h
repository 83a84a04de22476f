// The kernel of sweeps that only move along noise.
#pragma once

#include "context.h"
#include "unit.h"

namespace zokern {

// Moves octets, kThreads apart, along every direction: K directions, or as many as the batch has
// where K is 0. Where every scale is 1, `scaled` may be false.
template <Law law, int K, bool scaled, int octets>
ZK_FN void displace(const SweepBatch& batch, const Operand& operand, uint64_t octet_index,
                    float (&values)[octets][8]) {
    const uint32_t directions = K ? K : batch.directions;
#ifdef __CUDA_ARCH__
#pragma unroll(K ? K : 1)
#endif
    for (uint32_t k = 0; k < directions; ++k) {
        const Factor factor = batch.factors[operand.first_factor + k];
        const BatchStream stream = {batch.keys, operand.c1, operand.c2, batch.draws[k]};
        if (scaled && factor.scale != 1.0f) {
            ZK_UNROLL
            for (int i = 0; i < octets; ++i) {
                ZK_UNROLL
                for (int j = 0; j < 8; ++j) values[i][j] = factor.scale * values[i][j];
            }
        }
        ZK_UNROLL
        for (int i = 0; i < octets; ++i) {
            float z[8];
            octet<law>(stream, octet_index + i * kThreads, z);
            ZK_UNROLL
            for (int j = 0; j < 8; ++j) values[i][j] = fma32(factor.coeff, z[j], values[i][j]);
        }
    }
}

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
    const uint64_t phase = operand.offset % 8;
    const bool whole = operand.vectors && operand.rows == 1 && operand.picked == nullptr &&
                       8 * begin >= phase && 8 * (begin + per_block) <= operand.row_length + phase;
    if (whole) {
        if (operand.out != nullptr)
            sweep_whole<law, storage, K, true, true>(batch, operand, begin + at.thread());
        else if (batch.scaled)
            sweep_whole<law, storage, K, true, false>(batch, operand, begin + at.thread());
        else
            sweep_whole<law, storage, K, false, false>(batch, operand, begin + at.thread());
    } else {
        const uint64_t units = units_of(operand);
        const uint64_t end = begin + per_block < units ? begin + per_block : units;
        for (uint64_t index = begin + at.thread(); index < end; index += kThreads)
            sweep_unit<law, storage>(batch, operand, index);
    }
}

}  // namespace zokern
