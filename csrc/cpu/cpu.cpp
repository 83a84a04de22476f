#include "cpu.h"

#include <algorithm>
#include <mutex>
#include <stdexcept>

#include "kernels.h"
#include "threads.h"

namespace zokern {
namespace {

// Below this many elements a thread is not worth waking.
constexpr int64_t kElementsPerThread = 1 << 14;
// Threads divide the elements at multiples of this, whole groups of every law and cache lines of
// every dtype.
constexpr int64_t kGrain = 1 << 10;

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

const CpuKernels& kernels_named(const std::string& capability) {
    static const std::vector<const CpuKernels*> available = available_kernels();
    for (const CpuKernels* kernels : available) {
        if (capability == kernels->name) return *kernels;
    }
    throw std::invalid_argument("this processor has no " + capability + " kernels");
}

// Calls work(begin, end) for ranges that together cover [0, count), one contiguous range a thread.
void over_ranges(int64_t count, int threads,
                 const std::function<void(int64_t begin, int64_t end)>& work) {
    const int64_t useful = (count + kElementsPerThread - 1) / kElementsPerThread;
    const int n = int(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
    const int64_t share = (count / n + kGrain) / kGrain * kGrain;
    run_on_threads(n, [&](int i) {
        const int64_t begin = std::min(count, i * share);
        const int64_t end = i == n - 1 ? count : std::min(count, begin + share);
        if (begin < end) work(begin, end);
    });
}

// Calls work(i, begin, end) for ranges of elements of tensors that together cover all of them.
template <class Tensor>
void over_tensors(const std::vector<Tensor>& tensors, int threads,
                  const std::function<void(size_t i, int64_t begin, int64_t end)>& work) {
    std::vector<int64_t> starts = {0};
    for (const Tensor& tensor : tensors) starts.push_back(starts.back() + tensor.numel);
    over_ranges(starts.back(), threads, [&](int64_t begin, int64_t end) {
        const auto after = std::upper_bound(starts.begin(), starts.end(), begin);
        for (size_t i = size_t(after - starts.begin()) - 1; begin < end; ++i) {
            const int64_t stop = std::min(end, starts[i + 1]);
            if (begin < stop) work(i, begin - starts[i], stop - starts[i]);
            begin = stop;
        }
    });
}

}  // namespace

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
                              sweep.plain};
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
