#if defined(__x86_64__)
#include "simd_avx2.h"
//
#include "simd_kernels.h"
//
#include "driver.h"
//
#include "deltas.h"

namespace zokern {
const CpuKernels kAvx2Kernels = {Simd::kName, sweep, products, sample, values, merge_deltas};
}  // namespace zokern
#endif
