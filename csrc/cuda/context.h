// Where a kernel's body runs: one thread of one block, of a real or of a simulated grid.
#pragma once

#include "../noise.h"

namespace zokern {

// A body whose threads hand each other results is written for a whole block, in phases: every
// thread ends one before any begins the next.

#ifdef __CUDACC__
struct DeviceContext {
    __device__ __forceinline__ uint32_t block() const { return blockIdx.x; }
    __device__ __forceinline__ uint32_t thread() const { return threadIdx.x; }

    // In a body for a whole block.
    template <class Phase>
    __device__ __forceinline__ void phase(const Phase& run) const {
        run(threadIdx.x);
        __syncthreads();
    }
};
#endif

struct HostContext {
    uint32_t block_index, thread_index;

    uint32_t block() const { return block_index; }
    uint32_t thread() const { return thread_index; }
};

// A whole block.
struct HostBlock {
    uint32_t block_index, threads;

    uint32_t block() const { return block_index; }

    template <class Phase>
    void phase(const Phase& run) const {
        for (uint32_t thread = 0; thread < threads; ++thread) run(thread);
    }
};

}  // namespace zokern
