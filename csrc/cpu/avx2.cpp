#if defined(__x86_64__)
#include "simd_avx2.h"
//
#include "simd_kernels.h"
//
#include "driver.h"
//
#include "simd_filter.h"
//
#include "select_kernels.h"
//
#include "merge_driver.h"
//
#include "deltas.h"

namespace zokern {
const CpuKernels kAvx2Kernels = {Simd::kName, sweep,     products,   sample,
                                 values,      histogram, collect,    count_equals,
                                 find_equal,  l1_sums,   merge_step, merge_deltas};
}  // namespace zokern
#endif
