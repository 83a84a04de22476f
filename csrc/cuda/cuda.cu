// The launches: device, stream and errors.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>

#include "cuda.h"
#include "launch.cuh"
#include "merge_kernel.h"
#include "plan.h"
#include "product_body.h"
#include "sample_body.h"
#include "sweep_kernel.cuh"

namespace zokern {
namespace {

template <Law law>
__global__ void __launch_bounds__(kThreads)
    sample_global(const __grid_constant__ SampleBatch batch) {
    sample_body<law>(DeviceContext(), batch);
}

template <Law law>
__global__ void __launch_bounds__(kThreads)
    product_global(const __grid_constant__ ProductBatch batch) {
    __shared__ ExactProducts sums[kThreads];
    product_body<law>(DeviceContext(), batch, sums);
}

template <Law law>
auto kernel_for(const SweepLaunch& launch) {
    return sweep_kernel<law>(launch.storage, launch.batch.directions);
}

template <Law law>
auto kernel_for(const UpdateLaunch& launch) {
    return update_kernel<law>(launch.storage, launch.masters);
}

template <Law law>
auto kernel_for(const ProductLaunch&) {
    return product_global<law>;
}

template <class Kernel, class Launch>
void launch_one(Kernel kernel, const Launch& launch, uintptr_t stream, const char* what) {
    kernel<<<launch.blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(launch.batch);
    check(cudaGetLastError(), what);
}

template <class Launch>
void launch_all(Law law, const std::vector<Launch>& launches, int device, uintptr_t stream,
                const char* what) {
    if (launches.empty()) return;
    const DeviceGuard guard(device);
    with_direction(law, [&](auto law) {
        for (const Launch& launch : launches)
            launch_one(kernel_for<law()>(launch), launch, stream, what);
    });
}

std::string version(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

// Machine code runs within its major version; the newest architecture's PTX on all that follow.
bool can_run(int capability, const std::vector<int>& compiled) {
    const auto same_major = [&](int c) { return c / 10 == capability / 10 && c <= capability; };
    return std::any_of(compiled.begin(), compiled.end(), same_major) ||
           capability >= *std::max_element(compiled.begin(), compiled.end());
}

}  // namespace

void cuda_sweep(const Sweep& sweep, int device, uintptr_t stream) {
    constexpr const char* what = "the launch of a sweep";
    if (sweep.plain)
        launch_all(sweep.law, plan_sweep(sweep), device, stream, what);
    else
        launch_all(sweep.law, plan_update(sweep), device, stream, what);
}

void cuda_merge_step(const MergeStep& step, int device, uintptr_t stream) {
    const DeviceGuard guard(device);
    for (const MergeLaunch& launch : plan_merge(step))
        launch_one(merge_kernel(launch.storage, launch.masters), launch, stream,
                   "the launch of a merging step");
}

void cuda_inner_products(const Products& products, ExactProducts* partials, int device,
                         uintptr_t stream) {
    launch_all(products.law, plan_products(products, partials), device, stream,
               "the launch of inner products");
}

void cuda_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                 int64_t offset, void* out, int device, uintptr_t stream) {
    const SampleLaunch launch = plan_sample(law, numel, seed, draw, tensor_id, offset, out);
    if (launch.blocks == 0) return;
    const DeviceGuard guard(device);
    with_law(law, [&](auto law) {
        sample_global<law()>
            <<<launch.blocks, kThreads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(launch.batch);
    });
    check(cudaGetLastError(), "the launch of a sample");
}

std::vector<int> cuda_architectures() {
    std::vector<int> result = {__CUDA_ARCH_LIST__};
    for (int& architecture : result) architecture /= 10;
    return result;
}

std::string cuda_why_not(int device) {
    int count = 0, driver = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();
        return describe(status);
    }
    if (device < 0 || device >= count)
        return "there is no CUDA device " + std::to_string(device) + ", only " +
               std::to_string(count);
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    if (driver < 12010) return "kernel parameters of 32 KB need a driver for CUDA 12.1 or newer";

    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "cudaDeviceGetAttribute");
    const std::vector<int> compiled = cuda_architectures();
    if (can_run(10 * major + minor, compiled)) return "";
    std::string versions;
    for (int architecture : compiled)
        versions += (versions.empty() ? "" : ", ") + version(architecture);
    return "its compute capability is " + version(10 * major + minor) + "; there is code for " +
           versions + " and newer";
}

}  // namespace zokern
