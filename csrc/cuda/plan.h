// How the work is cut into launches and blocks: plain C++, the same for a device and for the
// simulated grid.
//
// Work is counted in units: the octets of the global element index (elements 8i … 8i + 7 of the
// full tensor) that a tensor's rows touch, row after row. A block takes `steps` × kThreads
// consecutive units, thread t the units t, t + kThreads, ….
#pragma once

#include <cstdint>
#include <vector>

#include "../merging.h"
#include "../sums.h"
#include "../sweep.h"

namespace zokern {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kMaxDirections = 1024;  // in a sweep
constexpr uint32_t kMaxFactors = 1024;     // rows × directions in a launch

// How a tensor of a launch lies in its full tensor: element (r, k) is element
// offset + r row_stride + k there. The stride is 0 where there is one row, the first.
struct Extent {
    uint64_t offset, row_length, row_stride, rows;
    uint64_t reciprocal;  // ⌊(2^64 - 1) / units_per_row⌋
    uint32_t c1, c2;      // of the counter
    uint32_t vectors;     // whether octets lie on 16-byte boundaries, so that vectors can be used
};

// As many for every row as for the one that touches the most octets.
ZK_FN uint64_t units_per_row(const Extent& e) {
    const uint64_t phase = e.row_stride % 8 == 0 ? e.offset % 8 : 7;
    return (phase + e.row_length + 7) / 8;
}

ZK_FN uint64_t units_of(const Extent& e) { return e.rows * units_per_row(e); }

struct Operand : Extent {
    char* param;
    char* residual;
    char* out;              // or null: then the sweep is in place
    const int64_t* picked;  // its rows' numbers in the full tensor, or null: they are in order
    uint32_t first_factor;  // its row of factors
};

// Of a sweep that is more than a move along noise; see ../sweep.h.
struct UpdateOperand : Operand {
    float* master;
    float* momentum;
    DenseTensor dense[kMaxDense];
    float decay, step;
};

struct ProductOperand : Extent {
    DenseTensor vector;
};

struct MergeOperand : Extent {
    MergeTensor tensor;
};

struct Factor {
    float coeff, scale;
};

// The batches are kernels' parameters, of which CUDA 12.1 and later pass 32,764 bytes.
constexpr size_t kParameterBytes = 32764;

template <class OperandType, uint32_t capacity>
struct Batch {
    static constexpr uint32_t kMaxOperands = capacity;

    OperandType operands[capacity];
    uint32_t first_blocks[capacity];
    KeySchedule keys;
    uint32_t operand_count, steps;
};

template <class OperandType, uint32_t capacity>
struct MoveBatch : Batch<OperandType, capacity> {
    Factor factors[kMaxFactors];
    uint32_t draws[kMaxDirections];
    uint32_t directions;
    uint32_t scaled;  // whether any scale is not 1
};

struct SweepBatch : MoveBatch<Operand, 192> {};
static_assert(sizeof(SweepBatch) <= kParameterBytes, "kernel parameters");

struct UpdateBatch : MoveBatch<UpdateOperand, 100> {
    float gradient[kMaxFactors];
    uint32_t dense[kMaxDirections / 32];  // bit k: draws[k] is ~slot of a dense direction
    uint32_t rest, updates, sign;
    uint32_t moves;             // whether it only moves, along noise alone, and rests first or last
    uint32_t rounds, rounding;  // whether it rounds stochastically, and by which draw
};
static_assert(sizeof(UpdateBatch) <= kParameterBytes, "kernel parameters");

struct MergeBatch : Batch<MergeOperand, 120> {
    Method method;
};
static_assert(sizeof(MergeBatch) <= kParameterBytes, "kernel parameters");

struct ProductBatch : Batch<ProductOperand, 256> {
    uint32_t draw;
    ExactProducts* partials;  // of the launch's blocks
};
static_assert(sizeof(ProductBatch) <= kParameterBytes, "kernel parameters");

// Of a kernel for a storage, and for parameters that masters stand for or not.
template <class BatchType>
struct MoveLaunch {
    Storage storage;
    bool masters;
    uint32_t blocks;
    BatchType batch;
};

using SweepLaunch = MoveLaunch<SweepBatch>;
using UpdateLaunch = MoveLaunch<UpdateBatch>;
using MergeLaunch = MoveLaunch<MergeBatch>;

// Of a sweep that is plain, and of any sweep.
std::vector<SweepLaunch> plan_sweep(const Sweep& sweep);
std::vector<UpdateLaunch> plan_update(const Sweep& sweep);

std::vector<MergeLaunch> plan_merge(const MergeStep& step);

struct ProductLaunch {
    uint32_t blocks;
    ProductBatch batch;
};

// The blocks of one tensor follow on those of the one before it.
std::vector<uint32_t> product_blocks(const Products& products);
std::vector<ProductLaunch> plan_products(const Products& products, ExactProducts* partials);

struct SampleBatch {
    void* out;
    uint64_t offset, numel;
    Stream stream;
};

struct SampleLaunch {
    uint32_t blocks;  // 0 where there is nothing to do
    SampleBatch batch;
};

SampleLaunch plan_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                         int64_t offset, void* out);

}  // namespace zokern
