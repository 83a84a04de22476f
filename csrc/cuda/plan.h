// How the work is cut into launches and blocks: plain C++, the same for a device and for the
// simulated grid.
//
// Work is counted in units: the octets of the global element index (elements 8i … 8i + 7 of the
// full tensor) that a tensor's rows touch, row after row. A block moves `steps` × kThreads
// consecutive units, thread t the units t, t + kThreads, ….
#pragma once

#include <cstdint>
#include <vector>

#include "../sweep.h"

namespace zokern {

constexpr uint32_t kThreads = 256;
constexpr uint32_t kMaxOperands = 256;     // in a launch
constexpr uint32_t kMaxDirections = 1024;  // in a sweep
constexpr uint32_t kMaxFactors = 1024;     // rows × directions in a launch

// A tensor of a launch. Its element (r, k) is element offset + r row_stride + k of the full tensor.
struct Operand {
    char* param;
    char* residual;
    uint64_t offset, row_length, row_stride, rows;
    uint64_t reciprocal;    // ⌊(2^64 - 1) / units_per_row⌋
    uint32_t c1, c2;        // of the counter
    uint32_t first_factor;  // its row of factors
    uint32_t vectors;       // whether octets lie on 16-byte boundaries, so that vectors can be used
};

// As many for every row as for the one that touches the most octets.
ZK_FN uint64_t units_per_row(const Operand& o) {
    const uint64_t phase = o.rows == 1 || o.row_stride % 8 == 0 ? o.offset % 8 : 7;
    return (phase + o.row_length + 7) / 8;
}

struct Factor {
    float coeff, scale;
};

// A kernel's parameters. CUDA 12.1 and later pass 32,764 bytes.
struct SweepBatch {
    Operand operands[kMaxOperands];
    uint32_t first_blocks[kMaxOperands];
    Factor factors[kMaxFactors];
    uint32_t draws[kMaxDirections];
    KeySchedule keys;
    uint32_t operand_count, directions, steps;
    uint32_t scaled;  // whether any scale is not 1
};
static_assert(sizeof(SweepBatch) <= 32764, "kernel parameters");

struct SweepLaunch {
    Storage storage;
    uint32_t blocks;
    SweepBatch batch;
};

std::vector<SweepLaunch> plan_sweep(const Sweep& sweep);

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
