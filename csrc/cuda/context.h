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
    __device__ __forceinline__ uint32_t threads() const { return blockDim.x; }
    template <class Phase>
    __device__ __forceinline__ void phase(const Phase& run) const {
        run(threadIdx.x);
        __syncthreads();
    }

    // Counters that threads share. Neighbors that count in the same one do so at once: values that
    // are all equal would wait for one another.
    template <class Number>
    __device__ __forceinline__ void count(Number* counter) const {
        const unsigned active = __activemask();
        int same;
        __match_all_sync(active, reinterpret_cast<unsigned long long>(counter), &same);
        if (!same)
            atomicAdd(counter, Number(1));
        else if ((threadIdx.x & 31u) == unsigned(__ffs(int(active)) - 1))
            atomicAdd(counter, Number(__popc(active)));
    }
    template <class Number>
    __device__ __forceinline__ void add(Number* counter, uint32_t n) const {
        atomicAdd(counter, Number(n));
    }
    __device__ __forceinline__ void raise(uint32_t* largest, uint32_t n) const {
        atomicMax(largest, n);
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
    uint32_t block_index, thread_count;

    uint32_t block() const { return block_index; }
    uint32_t threads() const { return thread_count; }

    template <class Phase>
    void phase(const Phase& run) const {
        for (uint32_t thread = 0; thread < thread_count; ++thread) run(thread);
    }

    template <class Number>
    void count(Number* counter) const {
        ++*counter;
    }
    template <class Number>
    void add(Number* counter, uint32_t n) const {
        *counter += n;
    }
    void raise(uint32_t* largest, uint32_t n) const { *largest = n > *largest ? n : *largest; }
};

}  // namespace zokern
