// The native CPU operations: the instruction set is chosen at run time, the work spread over
// threads.
#pragma once

#include <string>
#include <vector>

#include "../deltas.h"
#include "../magnitudes.h"
#include "../merging.h"
#include "../sweep.h"

namespace zokern {

struct CpuKernels;

// Those that this processor has, the best one last.
std::vector<std::string> cpu_capabilities();

// `capability` is one of cpu_capabilities(), or a std::invalid_argument says so.
const CpuKernels& kernels_named(const std::string& capability);

void cpu_sweep(const Sweep& sweep, const std::string& capability, int threads);

// Three sums for each tensor: v·v, v·z and z·z.
void cpu_inner_products(const Products& products, double* out, const std::string& capability,
                        int threads);

void cpu_merge_step(const MergeStep& step, const std::string& capability, int threads);

// float32 for directions, int64 for words.
void cpu_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                int64_t offset, void* out, const std::string& capability, int threads);

// The values that a law gives to groups of four words; groups must be a multiple of 16.
void cpu_values(Law law, const uint32_t* words, int64_t groups, void* out,
                const std::string& capability);

void cpu_merge_deltas(const DeltaMerge& merge, const std::string& capability, int threads);
void cpu_select(const Selection& selection, const Thresholds& out, const std::string& capability,
                int threads);

// Two sums for each tensor: of all magnitudes, and of those that the mask keeps.
void cpu_l1_sums(const L1Sums& sums, double* out, const std::string& capability, int threads);

// For each tensor a row of `bins` counts of magnitudes, in bins of 2^shift from its low on.
void cpu_histogram(const std::vector<ValueTensor>& tensors, const int64_t* lows, int shift,
                   int64_t bins, int64_t* out, const std::string& capability, int threads);

// For each tensor a row of `ranges` counts of the values of its magnitude between its edges.
void cpu_equal_counts(const std::vector<ValueTensor>& tensors, const int64_t* magnitudes,
                      const int64_t* edges, int64_t ranges, int64_t* out,
                      const std::string& capability, int threads);

}  // namespace zokern
