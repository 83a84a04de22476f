// A unit of work: where its octet lies in an operand, and the octet read and written there.
#pragma once

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
template <class OperandType, uint32_t capacity>
ZK_FN uint32_t find_operand(const Batch<OperandType, capacity>& batch, uint32_t block) {
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

// A block's units of an operand: [begin, end).
struct Share {
    uint64_t begin, end;
};

template <class OperandType, uint32_t capacity>
ZK_FN Share share_of(const Batch<OperandType, capacity>& batch, uint32_t operand, uint32_t block) {
    const uint64_t per_block = uint64_t(batch.steps) * kThreads;
    const uint64_t begin = (block - batch.first_blocks[operand]) * per_block;
    const uint64_t units = units_of(batch.operands[operand]);
    return {begin, begin + per_block < units ? begin + per_block : units};
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

// The elements of an octet that lie in its row: bit j for the one at column + j.
ZK_FN uint32_t present(int64_t column, int64_t row_length) {
    const int64_t left = row_length - column;
    if (left <= 0) return 0;
    const uint32_t before_end = left < 8 ? 0xFFu >> (8 - left) : 0xFFu;
    return column < 0 ? before_end & 0xFFu << -column : before_end;
}

struct Unit {
    uint64_t octet_index;  // in the full tensor
    int64_t first;         // the octet's first element in the operand, where it may not exist
    uint32_t mask;         // bit j: element j exists
    bool vectors;          // whether the octet can be moved in vectors
};

// `picked`: see Operand.
ZK_FN Unit locate(const Extent& extent, uint64_t index, const int64_t* picked = nullptr) {
    const uint64_t per_row = units_per_row(extent);
    uint64_t row = 0;
    if (extent.rows > 1) {
        row = high_product(index, extent.reciprocal);
        if (index - row * per_row >= per_row) ++row;
    }
    const uint64_t number = picked == nullptr ? row : uint64_t(picked[row]);
    const uint64_t row_offset = extent.offset + number * extent.row_stride;
    const uint64_t octet_index = row_offset / 8 + (index - row * per_row);
    // Of the octet's first element, in its row; negative where the row starts inside the octet.
    const int64_t column = int64_t(8 * octet_index - row_offset);
    const uint32_t mask = present(column, int64_t(extent.row_length));
    return {octet_index, int64_t(row * extent.row_length) + column, mask,
            extent.vectors && mask == 0xFFu};
}

// Of an octet whose first element lies, or would lie, at `at`.
template <int bytes>
ZK_FN Octet<bytes> load(const char* at, const Unit& unit) {
    if constexpr (bytes == 0)
        return {};
    else
        return unit.vectors ? load_vectors<bytes>(at) : load_some<bytes>(at, unit.mask);
}

template <int bytes>
ZK_FN void store(char* at, const Unit& unit, const Octet<bytes>& octet) {
    if constexpr (bytes > 0) {
        if (unit.vectors)
            store_vectors<bytes>(at, octet);
        else
            store_some<bytes>(at, octet, unit.mask);
    }
}

// Elements that do not exist are read as zeros.
template <Storage storage>
ZK_FN void load_values(const char* param, const char* residual, const Unit& unit, float* values) {
    StoredOctet<storage> stored;
    stored.param = load<param_bytes(storage)>(param, unit);
    stored.residual = load<residual_bytes(storage)>(residual, unit);
    decode(stored, values);
}

// In a parameter and its residual, if it has one.
template <Storage storage>
ZK_FN void store_octet(void* param, void* residual, const Unit& unit,
                       const StoredOctet<storage>& octet) {
    constexpr int pbytes = param_bytes(storage), rbytes = residual_bytes(storage);
    store<pbytes>(static_cast<char*>(param) + unit.first * pbytes, unit, octet.param);
    store<rbytes>(static_cast<char*>(residual) + unit.first * rbytes, unit, octet.residual);
}

// Of an operand and its residual, if it has one.
template <Storage storage>
ZK_FN void load_from(const void* param, const void* residual, const Unit& unit, float* values) {
    load_values<storage>(static_cast<const char*>(param) + unit.first * param_bytes(storage),
                         static_cast<const char*>(residual) + unit.first * residual_bytes(storage),
                         unit, values);
}

template <Storage storage>
ZK_FN void store_to(void* param, void* residual, const Unit& unit, const float* values) {
    store_octet<storage>(param, residual, unit, encode<storage>(values));
}

// Where the sweep leaves them: see Operand.
template <Storage storage>
ZK_FN void finish_unit(const Operand& operand, const Unit& unit, const float* values) {
    if (operand.out == nullptr)
        store_to<storage>(operand.param, operand.residual, unit, values);
    else
        store_to<alone(storage)>(operand.out, nullptr, unit, values);
}

// Whether a block's units, `begin` the first of them, are full octets on vector boundaries in a
// tensor of one row.
ZK_FN bool is_whole(const Operand& operand, uint64_t begin, uint64_t per_block) {
    const uint64_t phase = operand.offset % 8;
    return operand.vectors && operand.rows == 1 && operand.picked == nullptr &&
           8 * begin >= phase && 8 * (begin + per_block) <= operand.row_length + phase;
}

ZK_FN void load_dense(const DenseTensor& dense, const Unit& unit, float* values) {
    if (dense.type == Storage::bf16)
        load_from<Storage::bf16>(dense.data, nullptr, unit, values);
    else if (dense.type == Storage::fp16)
        load_from<Storage::fp16>(dense.data, nullptr, unit, values);
    else
        load_from<Storage::fp32>(dense.data, nullptr, unit, values);
}

}  // namespace zokern
