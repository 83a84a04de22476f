#if defined(__x86_64__)
#include "simd_avx512.h"
//
#include "simd_kernels.h"
//
#include "driver.h"
//
#include "deltas.h"

namespace zokern {
const CpuKernels kAvx512Kernels = {Simd::kName, sweep, products, sample, values, merge_deltas};
}  // namespace zokern
#endif
