// How an operation's elements are divided among threads. Not for the files of an instruction set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "threads.h"

namespace zokern {

// Below this many elements a thread is not worth waking.
constexpr int64_t kElementsPerThread = 1 << 14;
// Threads divide the elements at multiples of this, whole groups of every law and cache lines of
// every dtype.
constexpr int64_t kGrain = 1 << 10;

// So many pieces has a thread's range, if they are not too short.
constexpr int64_t kPieces = 32;
constexpr int64_t kElementsPerPiece = 1 << 16;

// Calls work(begin, end) for ranges that together cover [0, count). Each thread goes through one
// contiguous range, in pieces; who is done takes pieces of the others, which may be on slower or
// busier processors.
inline void over_ranges(int64_t count, int threads,
                        const std::function<void(int64_t begin, int64_t end)>& work,
                        int64_t pieces = kPieces) {
    const int64_t useful = (count + kElementsPerThread - 1) / kElementsPerThread;
    const int n = int(std::max<int64_t>(1, std::min<int64_t>(threads, useful)));
    const int64_t share = (count / n + kGrain) / kGrain * kGrain;
    const int64_t piece = std::max(kElementsPerPiece, (share / pieces + kGrain) / kGrain * kGrain);
    struct alignas(64) Range {
        std::atomic<int64_t> next;
        int64_t end;
    };
    std::vector<Range> ranges(static_cast<size_t>(n));
    for (int i = 0; i < n; ++i) {
        ranges[size_t(i)].next = std::min(count, i * share);
        ranges[size_t(i)].end = i == n - 1 ? count : std::min(count, (i + 1) * share);
    }
    run_on_threads(n, [&](int own) {
        for (int i = 0; i < n; ++i) {
            Range& range = ranges[size_t((own + i) % n)];
            for (int64_t begin; (begin = range.next.fetch_add(piece)) < range.end;)
                work(begin, std::min(range.end, begin + piece));
        }
    });
}

// Tensors as if they were joined: where the elements of each begin.
class Joined {
  public:
    template <class Tensor>
    explicit Joined(const std::vector<Tensor>& tensors) {
        for (const Tensor& tensor : tensors) starts_.push_back(starts_.back() + tensor.numel);
    }

    int64_t total() const { return starts_.back(); }
    int64_t start(size_t i) const { return starts_[i]; }

    // Calls work(i, begin, end) for the elements of each tensor that are between these places.
    template <class Work>
    void over_parts(int64_t begin, int64_t end, const Work& work) const {
        const auto after = std::upper_bound(starts_.begin(), starts_.end(), begin);
        for (size_t i = size_t(after - starts_.begin()) - 1; begin < end; ++i) {
            const int64_t stop = std::min(end, starts_[i + 1]);
            if (begin < stop) work(i, begin - starts_[i], stop - starts_[i]);
            begin = stop;
        }
    }

  private:
    std::vector<int64_t> starts_ = {0};
};

// Calls work(i, begin, end) for ranges of elements of tensors that together cover all of them.
template <class Tensor>
void over_tensors(const std::vector<Tensor>& tensors, int threads,
                  const std::function<void(size_t i, int64_t begin, int64_t end)>& work) {
    const Joined joined(tensors);
    over_ranges(joined.total(), threads,
                [&](int64_t begin, int64_t end) { joined.over_parts(begin, end, work); });
}

}  // namespace zokern
