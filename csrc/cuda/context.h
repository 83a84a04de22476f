// Where a kernel's body runs: one thread of one block, of a real or of a simulated grid.
#pragma once

#include "../noise.h"

namespace zokern {

#ifdef __CUDACC__
struct DeviceContext {
    __device__ __forceinline__ uint32_t block() const { return blockIdx.x; }
    __device__ __forceinline__ uint32_t thread() const { return threadIdx.x; }
};
#endif

struct HostContext {
    uint32_t block_index, thread_index;

    uint32_t block() const { return block_index; }
    uint32_t thread() const { return thread_index; }
};

}  // namespace zokern
