// How operands lie in their tensors, and the blocks that it takes to go over them.
#pragma once

#include <algorithm>

#include "plan.h"

namespace zokern {

constexpr uint64_t kMaxBlocks = (uint64_t(1) << 31) - 1;

// Of the operand at `base`; null where there is none.
inline bool on_boundaries(const void* base, int element_bytes, const Extent& e) {
    if (base == nullptr) return true;
    const uint64_t bytes = uint64_t(element_bytes), boundary = std::min<uint64_t>(16, 8 * bytes);
    const uint64_t origin = reinterpret_cast<uintptr_t>(base) - e.offset * bytes;
    const uint64_t row_shift = (e.row_stride - e.row_length) * bytes;
    return origin % boundary == 0 && (e.rows == 1 || row_shift % boundary == 0);
}

inline bool on_boundaries(const DenseTensor& dense, const Extent& e) {
    return on_boundaries(dense.data, param_bytes(dense.type), e);
}

inline const int64_t* picked_rows(const SweepTensor& t) { return t.rows; }

template <class Tensor>
const int64_t* picked_rows(const Tensor&) {
    return nullptr;
}

// All but `vectors`. The tensor is not empty.
template <class Tensor>
Extent extent_of(const Tensor& t, Law law) {
    const Stream stream = make_stream(0, t.tensor_id, 0, law);
    Extent e{};
    e.offset = uint64_t(t.offset);
    const bool one_row =
        picked_rows(t) == nullptr && (t.row_length == t.numel || t.row_stride == t.row_length);
    e.row_length = uint64_t(one_row ? t.numel : t.row_length);
    e.row_stride = uint64_t(one_row ? 0 : t.row_stride);
    e.rows = uint64_t(t.numel) / e.row_length;
    e.reciprocal = ~uint64_t(0) / units_per_row(e);
    e.c1 = stream.c1;
    e.c2 = stream.c2;
    return e;
}

// Long blocks amortise their prologue; this many keep every multiprocessor busy to the end.
constexpr uint64_t kEnoughBlocks = 4096;
constexpr uint32_t kMinSteps = 4, kMaxSteps = 16;

inline uint32_t steps_for(uint64_t units) {
    uint32_t steps = kMinSteps;
    while (steps < kMaxSteps && units / (2 * steps * kThreads) >= kEnoughBlocks) steps *= 2;
    return steps;
}

inline uint64_t blocks_of(const Extent& e, uint32_t steps) {
    const uint64_t per_block = uint64_t(steps) * kThreads;
    return (units_of(e) + per_block - 1) / per_block;
}

// The launch has room for it.
template <class Launch, class OperandType>
void append(Launch& launch, const OperandType& operand) {
    auto& batch = launch.batch;
    batch.first_blocks[batch.operand_count] = launch.blocks;
    batch.operands[batch.operand_count++] = operand;
    launch.blocks += uint32_t(blocks_of(operand, batch.steps));
}

}  // namespace zokern
