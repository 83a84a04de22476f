#include "cpu.h"

#include <mutex>
#include <stdexcept>

#include "kernels.h"
#include "ranges.h"

namespace zokern {
namespace {

std::vector<const CpuKernels*> available_kernels() {
    std::vector<const CpuKernels*> kernels = {&kPortableKernels};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        kernels.push_back(&kAvx2Kernels);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni")) {
            kernels.push_back(&kAvx512Kernels);
        }
    }
#endif
    return kernels;
}

}  // namespace

const CpuKernels& kernels_named(const std::string& capability) {
    static const std::vector<const CpuKernels*> available = available_kernels();
    for (const CpuKernels* kernels : available) {
        if (capability == kernels->name) return *kernels;
    }
    throw std::invalid_argument("this processor has no " + capability + " kernels");
}

std::vector<std::string> cpu_capabilities() {
    std::vector<std::string> names;
    for (const CpuKernels* kernels : available_kernels()) names.push_back(kernels->name);
    return names;
}

void cpu_sweep(const Sweep& sweep, const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    over_tensors(sweep.tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        const SweepTensor& tensor = sweep.tensors[i];
        const int64_t count = int64_t(sweep.draws.size()), row = tensor.row * count;
        const Directions d = {sweep.law,
                              sweep.seed,
                              count,
                              sweep.rest,
                              sweep.draws.data(),
                              sweep.coeffs.data() + row,
                              sweep.scales.data() + row,
                              sweep.updates ? sweep.gradient.data() + row : nullptr,
                              sweep.sign,
                              sweep.plain,
                              sweep.rounding};
        kernels.sweep(d, tensor, begin, end);
    });
}

void cpu_inner_products(const Products& products, double* out, const std::string& capability,
                        int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    std::vector<ExactProducts> totals(products.tensors.size(), ExactProducts{});
    std::mutex adding;
    over_tensors(products.tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        const ProductTensor& tensor = products.tensors[i];
        const Stream stream =
            make_stream(products.seed, tensor.tensor_id, products.draw, products.law);
        ExactProducts sums{};
        kernels.products(products.law, stream, tensor, begin, end, sums);
        const std::lock_guard<std::mutex> lock(adding);
        add(totals[i], sums);
    });
    for (const ExactProducts& total : totals) {
        for (const ExactSum& sum : {total.vv, total.vz, total.zz}) *out++ = sum.high + sum.low;
    }
}

void cpu_merge_step(const MergeStep& step, const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    over_tensors(step.tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        kernels.merge_step(step.method, step.seed, step.tensors[i], begin, end);
    });
}

void cpu_sample(Law law, int64_t numel, uint64_t seed, uint32_t draw, uint64_t tensor_id,
                int64_t offset, void* out, const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    const Stream stream = make_stream(seed, tensor_id, draw, law);
    const bool words = law == Law::uniform32 || law == Law::rounding16;
    const int64_t size = words ? sizeof(int64_t) : sizeof(float);
    over_ranges(numel, threads, [&](int64_t begin, int64_t end) {
        kernels.sample(law, stream, offset + begin, offset + end,
                       static_cast<char*>(out) + begin * size);
    });
}

void cpu_values(Law law, const uint32_t* words, int64_t groups, void* out,
                const std::string& capability) {
    kernels_named(capability).values(law, words, groups, out);
}

void cpu_merge_deltas(const DeltaMerge& merge, const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    over_tensors(merge.tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        const DeltaTensor& tensor = merge.tensors[i];
        const DeltaSource* sources = merge.sources.data() + tensor.first_source;
        kernels.merge_deltas(merge.rules, tensor, sources, begin, end);
    });
}

}  // namespace zokern
