// The sweeps' kernels on the device. Each law has a .cu file of its own, so that they compile side
// by side.
#pragma once

#include "dispatch.h"
#include "sweep_body.h"
#include "update_body.h"

namespace zokern {

using SweepKernel = void (*)(const SweepBatch);
using UpdateKernel = void (*)(const UpdateBatch);

template <Law law, Storage storage, int K>
__global__ void __launch_bounds__(kThreads) sweep_global(const __grid_constant__ SweepBatch batch) {
    sweep_body<law, storage, K>(DeviceContext(), batch);
}

// With room for a fourth block on a multiprocessor registers would be spilled.
template <Law law, Storage storage, bool masters>
__global__ void __launch_bounds__(kThreads, 3)
    update_global(const __grid_constant__ UpdateBatch batch) {
    update_body<law, storage, masters>(DeviceContext(), batch);
}

// The kernel for a storage and a number of directions.
template <Law law>
SweepKernel sweep_kernel(Storage storage, uint32_t directions) {
    SweepKernel kernel = nullptr;
    with_storage(storage, [&](auto s) {
        with_directions<law>(directions, [&](auto k) { kernel = sweep_global<law, s(), k()>; });
    });
    return kernel;
}

template <Law law>
UpdateKernel update_kernel(Storage storage, bool masters) {
    UpdateKernel kernel = nullptr;
    with_masters(storage, masters, [&](auto s, auto m) { kernel = update_global<law, s(), m()>; });
    return kernel;
}

extern template SweepKernel sweep_kernel<Law::gauss16>(Storage, uint32_t);
extern template UpdateKernel update_kernel<Law::gauss16>(Storage, bool);
extern template SweepKernel sweep_kernel<Law::gauss32>(Storage, uint32_t);
extern template UpdateKernel update_kernel<Law::gauss32>(Storage, bool);
extern template SweepKernel sweep_kernel<Law::rademacher>(Storage, uint32_t);
extern template UpdateKernel update_kernel<Law::rademacher>(Storage, bool);
extern template SweepKernel sweep_kernel<Law::normal>(Storage, uint32_t);
extern template UpdateKernel update_kernel<Law::normal>(Storage, bool);

}  // namespace zokern
