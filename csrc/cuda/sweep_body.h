// The sweep's kernel.
#pragma once

#include "context.h"
#include "octet.h"
#include "plan.h"

namespace zokern {

ZK_FN uint64_t high_product(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return uint64_t((unsigned __int128)a * b >> 64);
#endif
}

// The operand whose blocks include this one: the last that starts at or before it.
ZK_FN uint32_t find_operand(const SweepBatch& batch, uint32_t block) {
    uint32_t low = 0, high = batch.operand_count;
    while (high - low > 1) {
        const uint32_t middle = (low + high) / 2;
        if (batch.first_blocks[middle] <= block)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// A draw of one operand. The round keys stay where they are, a GPU's constant memory.
struct BatchStream {
    const KeySchedule& keys;
    uint32_t c1, c2, draw;
};

ZK_FN Words group_words(const BatchStream& s, uint32_t group) {
#ifdef __CUDA_ARCH__
    // Hides that the index was cut down from 64 bits, which would have it multiplied in 64 bits.
    asm("" : "+r"(group));
#endif
    return philox({{group, s.c1, s.c2, s.draw}}, s.keys);
}

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

// Full octets on vector boundaries, in a tensor of one row.
template <Law law, Storage storage, int K, bool scaled>
ZK_FN void sweep_whole(const SweepBatch& batch, const Operand& operand, uint64_t unit) {
    constexpr int pbytes = param_bytes(storage), rbytes = residual_bytes(storage);
    constexpr int in_flight = 2;
    const uint64_t first = 8 * unit - operand.offset % 8;
    char* param = operand.param + first * pbytes;
    char* residual = operand.residual + first * rbytes;
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
            const StoredOctet<storage> stored = encode<storage>(values[i]);
            store_vectors<pbytes>(param + i * 8 * kThreads * pbytes, stored.param);
            if constexpr (rbytes > 0)
                store_vectors<rbytes>(residual + i * 8 * kThreads * rbytes, stored.residual);
        }
        param += in_flight * 8 * kThreads * pbytes;
        residual += in_flight * 8 * kThreads * rbytes;
        octet_index += in_flight * kThreads;
    }
}

// The elements of an octet that lie in its row: bit j for the one at column + j.
ZK_FN uint32_t present(int64_t column, int64_t row_length) {
    const int64_t left = row_length - column;
    if (left <= 0) return 0;
    const uint32_t before_end = left < 8 ? 0xFFu >> (8 - left) : 0xFFu;
    return column < 0 ? before_end & 0xFFu << -column : before_end;
}

// One octet of any tensor; its elements outside the row are left alone.
template <Law law, Storage storage>
ZK_FN void sweep_unit(const SweepBatch& batch, const Operand& operand, uint64_t unit) {
    constexpr int pbytes = param_bytes(storage), rbytes = residual_bytes(storage);
    const uint64_t per_row = units_per_row(operand);
    uint64_t row = 0;
    if (operand.rows > 1) {
        row = high_product(unit, operand.reciprocal);
        if (unit - row * per_row >= per_row) ++row;
    }
    const uint64_t row_offset = operand.offset + row * operand.row_stride;
    const uint64_t octet_index = row_offset / 8 + (unit - row * per_row);
    // Of the octet's first element, in its row; negative where the row starts inside the octet.
    const int64_t column = int64_t(8 * octet_index - row_offset);
    const uint32_t mask = present(column, int64_t(operand.row_length));
    const bool vectors = operand.vectors && mask == 0xFFu;

    const int64_t first = int64_t(row * operand.row_length) + column;
    char* param = operand.param + first * pbytes;
    char* residual = operand.residual + first * rbytes;
    StoredOctet<storage> stored;
    stored.param = vectors ? load_vectors<pbytes>(param) : load_some<pbytes>(param, mask);
    if constexpr (rbytes > 0)
        stored.residual =
            vectors ? load_vectors<rbytes>(residual) : load_some<rbytes>(residual, mask);
    float values[1][8];
    decode(stored, values[0]);
    displace<law, 0, true>(batch, operand, octet_index, values);
    stored = encode<storage>(values[0]);
    if (vectors)
        store_vectors<pbytes>(param, stored.param);
    else
        store_some<pbytes>(param, stored.param, mask);
    if constexpr (rbytes > 0) {
        if (vectors)
            store_vectors<rbytes>(residual, stored.residual);
        else
            store_some<rbytes>(residual, stored.residual, mask);
    }
}

template <Law law, Storage storage, int K, class Context>
ZK_FN void sweep_body(Context at, const SweepBatch& batch) {
    const uint32_t which = find_operand(batch, at.block());
    const Operand& operand = batch.operands[which];
    const uint64_t per_block = uint64_t(batch.steps) * kThreads;
    const uint64_t begin = (at.block() - batch.first_blocks[which]) * per_block;
    const uint64_t phase = operand.offset % 8;
    const bool whole = operand.vectors && operand.rows == 1 && 8 * begin >= phase &&
                       8 * (begin + per_block) <= operand.row_length + phase;
    if (whole) {
        if (batch.scaled)
            sweep_whole<law, storage, K, true>(batch, operand, begin + at.thread());
        else
            sweep_whole<law, storage, K, false>(batch, operand, begin + at.thread());
    } else {
        const uint64_t units = operand.rows * units_per_row(operand);
        const uint64_t end = begin + per_block < units ? begin + per_block : units;
        for (uint64_t unit = begin + at.thread(); unit < end; unit += kThreads)
            sweep_unit<law, storage>(batch, operand, unit);
    }
}

}  // namespace zokern
