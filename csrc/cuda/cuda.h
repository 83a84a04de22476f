// The CUDA kernels, and the same kernels over a simulated grid. No CUDA header is needed here.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../deltas.h"
#include "../magnitudes.h"
#include "../merging.h"
#include "../sums.h"
#include "../sweep.h"

namespace zokern {

// Failures of the CUDA runtime are thrown as std::runtime_error, with the error's name and text.
// Nothing waits for the device: the work is queued on `stream`.

// At most kMaxDirections (plan.h) directions; more are an error.
void cuda_sweep(const Sweep& sweep, int device, uintptr_t stream);

// The entries for each tensor are read by the kernels: they lie on the device.
void cuda_merge_step(const MergeStep& step, int device, uintptr_t stream);

// Partial sums, as many as count_partials says; sum_partials makes of them, once they are on the
// host, three sums v·v, v·z, z·z for each tensor.
void cuda_inner_products(const Products& products, ExactProducts* partials, int device,
                         uintptr_t stream);
size_t count_partials(const Products& products);
void sum_partials(const Products& products, const ExactProducts* partials, double* out);

void cuda_merge_deltas(const DeltaMerge& merge, int device, uintptr_t stream);

// Elements offset … offset + numel - 1 of a draw: float for gauss16, gauss32, rademacher and
// normal, int64 for uniform32 and rounding16.
void cuda_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                 int64_t offset, void* out, int device, uintptr_t stream);

// A selection's answers go to device memory; `largest` must be zeros, and so must `scratch`, of as
// many bytes as cuda_select_scratch says.
size_t cuda_select_scratch(const Selection& selection, int device);
void cuda_select(const Selection& selection, const Thresholds& out, void* scratch, int device,
                 uintptr_t stream);

// Two sums for each tensor, to device memory; scratch of l1_scratch bytes.
size_t l1_scratch(const L1Sums& sums);
void cuda_l1_sums(const L1Sums& sums, double* out, void* scratch, int device, uintptr_t stream);

// The compute capabilities compiled in, such as {80, 90, 100}; newer devices compile the newest
// one's PTX.
std::vector<int> cuda_architectures();

// Why the kernels cannot run on this device; empty where they can.
std::string cuda_why_not(int device);

// The kernels' own bodies, cut into the same launches, one thread after the other on the host.
// Present in every build.
void host_grid_sweep(const Sweep& sweep);
void host_grid_merge_step(const MergeStep& step);
void host_grid_inner_products(const Products& products, double* out);
void host_grid_merge_deltas(const DeltaMerge& merge);
void host_grid_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                      int64_t offset, void* out);
void host_grid_select(const Selection& selection, const Thresholds& out, size_t shared_bytes);
void host_grid_l1_sums(const L1Sums& sums, double* out);

}  // namespace zokern
