// The launches of selections and L1 sums.
#include "cuda.h"
#include "l1_body.h"
#include "launch.cuh"
#include "select_body.h"

namespace zokern {
namespace {

__global__ void __launch_bounds__(kCountThreads)
    select_first_digit(const __grid_constant__ ValueBatch batch) {
    extern __shared__ uint32_t shared[];
    count_first_digit(DeviceContext(), batch, shared);
}

__global__ void __launch_bounds__(kCountThreads)
    select_next_digit(const __grid_constant__ ValueBatch batch) {
    count_next_digit(DeviceContext(), batch);
}

__global__ void __launch_bounds__(kThreads)
    select_decide_digit(const __grid_constant__ GroupBatch batch) {
    __shared__ Counter sums[kThreads];
    decide_digit(DeviceContext(), batch, sums);
}

__global__ void __launch_bounds__(kThreads)
    select_count_ties(const __grid_constant__ ValueBatch batch) {
    __shared__ Counter sums[kThreads];
    count_ties(DeviceContext(), batch, sums);
}

__global__ void __launch_bounds__(kThreads)
    select_decide_ties(const __grid_constant__ GroupBatch batch) {
    __shared__ Counter sums[kThreads];
    decide_ties(DeviceContext(), batch, sums);
}

__global__ void __launch_bounds__(kThreads)
    select_find_tie(const __grid_constant__ ValueBatch batch) {
    __shared__ Counter sums[kThreads];
    find_tie(DeviceContext(), batch, sums);
}

__global__ void __launch_bounds__(kThreads)
    select_answer(const __grid_constant__ AnswerBatch batch) {
    answer_body(DeviceContext(), batch);
}

__global__ void __launch_bounds__(kThreads) l1_sum(const __grid_constant__ SumBatch batch) {
    __shared__ ExactSums sums[kThreads];
    l1_body(DeviceContext(), batch, sums);
}

__global__ void __launch_bounds__(kThreads) l1_total(const __grid_constant__ TotalBatch batch) {
    __shared__ ExactSums sums[kThreads];
    total_body(DeviceContext(), batch, sums);
}

// What a block can have where it asks for more than the usual 48 KB.
size_t shared_bytes_of(int device) {
    int bytes = 0;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "cudaDeviceGetAttribute");
    return size_t(bytes);
}

class Launcher {
  public:
    explicit Launcher(uintptr_t stream) : stream_(reinterpret_cast<cudaStream_t>(stream)) {}

    template <class Launch, class Batch>
    void run(const std::vector<Launch>& launches, void (*kernel)(Batch), uint32_t threads) const {
        for (const Launch& launch : launches) run(launch, kernel, threads, 0);
    }

    template <class Launch, class Batch>
    void run(const Launch& launch, void (*kernel)(Batch), uint32_t threads,
             uint32_t shared_bytes) const {
        if (launch.blocks == 0) return;
        kernel<<<launch.blocks, threads, shared_bytes, stream_>>>(launch.batch);
        check(cudaGetLastError(), "the launch of a selection");
    }

  private:
    const cudaStream_t stream_;
};

}  // namespace

size_t cuda_select_scratch(const Selection& selection, int device) {
    return select_scratch(selection, shared_bytes_of(device));
}

void cuda_select(const Selection& selection, const Thresholds& out, void* scratch, int device,
                 uintptr_t stream) {
    const DeviceGuard guard(device);
    const size_t shared_bytes = shared_bytes_of(device);
    check(cudaFuncSetAttribute(select_first_digit, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               int(shared_bytes)),
          "cudaFuncSetAttribute");
    const SelectPlan plan = plan_select(selection, out, scratch, shared_bytes);
    const Launcher launcher(stream);
    for (const SelectPlan::Pass& pass : plan.passes) {
        for (const ValueLaunch& launch : pass.counts) {
            const auto kernel = launch.batch.first_pass ? select_first_digit : select_next_digit;
            launcher.run(launch, kernel, kCountThreads, launch.shared_bytes);
        }
        launcher.run(pass.decisions, select_decide_digit, kThreads);
    }
    launcher.run(plan.ties, select_count_ties, kThreads);
    launcher.run(plan.tie_decisions, select_decide_ties, kThreads);
    launcher.run(plan.ties, select_find_tie, kThreads);
    launcher.run(plan.answers, select_answer, kThreads);
}

void cuda_l1_sums(const L1Sums& sums, double* out, void* scratch, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    const SumPlan plan = plan_l1_sums(sums, out, scratch);
    const Launcher launcher(stream);
    launcher.run(plan.sums, l1_sum, kThreads);
    launcher.run(plan.totals, l1_total, kThreads);
}

}  // namespace zokern
