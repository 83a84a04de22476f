#include "dispatch.h"
#include "merge_body.h"
#include "merge_kernel.h"

namespace zokern {
namespace {

// With room for a third block on a multiprocessor registers would be spilled.
template <Storage storage, bool masters>
__global__ void __launch_bounds__(kThreads, 2)
    merge_global(const __grid_constant__ MergeBatch batch) {
    merge_body<storage, masters>(DeviceContext(), batch);
}

}  // namespace

MergeKernel merge_kernel(Storage storage, bool masters) {
    MergeKernel kernel = nullptr;
    with_masters(storage, masters, [&](auto s, auto m) { kernel = merge_global<s(), m()>; });
    return kernel;
}

}  // namespace zokern
