// The search for the k-th largest magnitude. Of many: one pass over the values, which collects
// those in the bracket that a sample tells. Else, and where that misleads: passes each of which
// counts how many fall into each bin of a bracket and so narrows the interval that it lies in.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <memory>
#include <mutex>

#include "cpu.h"
#include "kernels.h"
#include "ranges.h"

namespace zokern {
namespace {

// Counters may take a byte for each of a thread's elements: kCopies of 4 bytes, and one of 8.
constexpr int64_t kBytesPerBin = 24;
constexpr int64_t kMinBins = 256, kMaxBins = 1 << 16;
// Of so many elements one of kSampled groups of a cache line, or more, so that kWanted of what is
// wanted are among them, tells a bracket. The distances are odd: no power of 2, as rows are.
constexpr int64_t kMany = 1 << 16, kGroup = 16, kSampled = 128, kWanted = 128;
// So many deviations of a sample of single elements it extends to both sides.
constexpr double kDeviations = 6;
// The counters have 32 bits.
constexpr int64_t kElementsAtOnce = 1 << 30;
constexpr int64_t kChunk = 1 << 16;
// Tensors of fewer elements are searched by one thread each.
constexpr int64_t kShared = 1 << 17;

struct Answer {
    uint32_t threshold;
    int64_t cut;
};

struct Found {
    uint32_t magnitude;
    int64_t above, equals;
};

struct Pass {
    std::vector<int64_t> counts;
    int64_t above;
};

// What a thread has collected of a bracket whose bins are magnitudes.
struct Part {
    std::unique_ptr<uint32_t[]> bins;
    int64_t count;
    Tally tally;
};

// The k-th largest of those in the bracket, where there are so many.
Found kth_of(const std::vector<Part>& parts, int64_t k, const Bracket& b) {
    const auto over_all = [&](const auto& run) {
        for (const Part& part : parts)
            for (int64_t j = 0; j < part.count; ++j) run(part.bins[j]);
    };
    int shift = 0;
    while ((b.width - 1) >> shift >= kMaxBins) ++shift;
    std::vector<int64_t> counts(((b.width - 1) >> shift) + 1);
    over_all([&](uint32_t place) { ++counts[place >> shift]; });
    size_t bin = counts.size() - 1;
    int64_t above = 0;
    for (; above + counts[bin] < k; --bin) above += counts[bin];
    std::vector<uint32_t> inside;
    inside.reserve(size_t(counts[bin]));
    over_all([&](uint32_t place) {
        if (place >> shift == bin) inside.push_back(place);
    });
    const auto kth = inside.begin() + (k - above - 1);
    std::nth_element(inside.begin(), kth, inside.end(), std::greater<uint32_t>());
    const uint32_t found = *kth;
    for (const uint32_t place : inside) above += place > found;
    return {b.low + found, above, std::count(inside.begin(), inside.end(), found)};
}

// One tensor, or all as if they were joined.
class Search {
  public:
    Search(const CpuKernels& kernels, std::vector<ValueTensor> tensors, int threads)
        : kernels_(kernels),
          tensors_(std::move(tensors)),
          joined_(tensors_),
          threads_(threads),
          largest_(tensors_.size()) {
        for (const ValueTensor& tensor : tensors_) {
            zero_bits_ = std::min(zero_bits_, zero_bits(tensor));
            halves_ = halves_ && zero_bits(tensor) == 13;
        }
        const int64_t bins = joined_.total() / threads_ / kBytesPerBin;
        max_bins_ = std::max(kMinBins, bins);
    }

    Answer run(int64_t k) {
        if (k == 0 || k >= joined_.total()) {
            count({0, 0, 0});  // for the largest
            return k == 0 ? Answer{kKeepsNothing, 0} : Answer{0, joined_.total()};
        }
        const Found found = find(k);
        const int64_t kept = k - found.above;
        return {found.magnitude, kept == found.equals ? joined_.total() : cut(found, kept)};
    }

    int64_t start(size_t i) const { return joined_.start(i); }
    uint32_t largest(size_t i) const { return largest_[i]; }

  private:
    // What magnitudes in [low, low + width) are counted in: as many bins as there may be.
    Bracket bracket(uint32_t low, uint32_t width) const {
        Bracket b = {low, width, zero_bits_};
        while (bins_of(b) > std::min(max_bins_, kMaxBins)) ++b.shift;
        return b;
    }

    Found find(int64_t k) {
        Found found;
        // Half precision has so few magnitudes that one pass counts them all.
        const bool is_large = joined_.total() >= kMany && zero_bits_ == 0;
        return is_large && find_by_sample(k, found) ? found : find_by_histograms(k);
    }

    // By one pass over what lies in a bracket; false where it is not there.
    bool find_by_sample(int64_t k, Found& found) {
        int64_t expected = 0;
        const Bracket b = sampled(k, expected);
        if (b.width <= std::min(max_bins_, kMaxBins)) return find_in(count(b), b, k, found);
        std::vector<Part> parts;
        if (!collect(b, 2 * expected, parts)) return false;
        int64_t above = 0, inside = 0;
        for (const Part& part : parts) {
            above += part.tally.above;
            inside += part.count;
        }
        if (k <= above || k > above + inside) return false;
        found = kth_of(parts, k - above, b);
        found.above += above;
        return true;
    }

    // The magnitudes between which the k-th largest very likely is, and how many there may be.
    Bracket sampled(int64_t k, int64_t& expected) {
        const int64_t total = joined_.total();
        const int64_t share = std::min(kSampled, std::max<int64_t>(1, k / kWanted));
        const int64_t stride = (share | 1) * kGroup;
        const int64_t room = (total / stride + 1) * kGroup + kRoomOfBlock;
        const std::unique_ptr<uint32_t[]> sample(new uint32_t[size_t(room)]);
        int64_t count = 0;
        for (int64_t i = 0; i < total; i += stride) {
            const int64_t end = std::min(total, i + kGroup);
            joined_.over_parts(i, end, [&](size_t t, int64_t own_begin, int64_t own_end) {
                Tally tally{};
                kernels_.collect(tensors_[t], own_begin, own_end, {0, 1u << 31, 0}, sample.get(),
                                 room, count, tally);
            });
        }
        const double wanted = double(k) * double(count) / double(total);
        const auto reach = int64_t(kDeviations * std::sqrt(wanted)) + 1;
        const int64_t low_rank = int64_t(wanted) + reach, high_rank = int64_t(wanted) - reach;
        uint32_t* const begin = sample.get();
        const auto nth = [&](int64_t rank, int64_t among) {
            std::nth_element(begin, begin + rank, begin + among, std::greater<uint32_t>());
            return begin[rank];
        };
        const uint32_t low = low_rank < count ? nth(low_rank, count) : 0;
        const uint32_t high =
            high_rank >= 0 ? nth(high_rank, std::min(low_rank, count)) : kMagnitude;
        expected = 2 * reach * total / count;
        return {low, high - low + 1, 0};
    }

    // Of all that lies in the bracket; false where there is no room for it.
    bool collect(const Bracket& b, int64_t room, std::vector<Part>& parts) {
        std::mutex adding;
        bool fits = true;
        const int64_t own_room = room / threads_ + kRoomOfBlock;
        const auto work = [&](int64_t begin, int64_t end) {
            Part part = {std::unique_ptr<uint32_t[]>(new uint32_t[size_t(own_room)]), 0, {}};
            bool own_fits = true;
            joined_.over_parts(begin, end, [&](size_t i, int64_t own_begin, int64_t own_end) {
                Tally tally{};
                own_fits =
                    own_fits && kernels_.collect(tensors_[i], own_begin, own_end, b,
                                                 part.bins.get(), own_room, part.count, tally);
                part.tally.above += tally.above;
                const std::lock_guard<std::mutex> lock(adding);
                largest_[i] = std::max(largest_[i], tally.largest);
            });
            const std::lock_guard<std::mutex> lock(adding);
            fits = fits && own_fits;
            parts.push_back(std::move(part));
        };
        over_ranges(joined_.total(), threads_, work, 1);
        return fits;
    }

    // Where a pass has counted the k-th largest in a bin of one magnitude.
    bool find_in(const Pass& pass, const Bracket& b, int64_t k, Found& found) const {
        int64_t above = pass.above;
        int64_t bin = int64_t(pass.counts.size()) - 1;
        if (k <= above) return false;
        while (bin >= 0 && above + pass.counts[size_t(bin)] < k)
            above += pass.counts[size_t(bin--)];
        if (bin < 0) return false;
        found = {b.low + uint32_t(bin), above, pass.counts[size_t(bin)]};
        return true;
    }

    Found find_by_histograms(int64_t k) {
        uint32_t low = 0, width = 1u << 31;
        Bracket b = halves_ ? bracket(kHalfLow, kHalfHigh - kHalfLow) : bracket(0, 1u << 31);
        while (true) {
            const Pass pass = count(b);
            int64_t above = pass.above;
            int64_t bin = int64_t(pass.counts.size()) - 1;
            while (bin >= 0 && above + pass.counts[size_t(bin)] < k) {
                above += pass.counts[size_t(bin)];
                --bin;
            }
            if (k <= pass.above) {
                width -= b.low + b.width - low;
                low = b.low + b.width;
            } else if (bin < 0) {
                width = b.low - low;
            } else {
                low = b.low + (uint32_t(bin) << b.shift);
                width = 1u << b.shift;
                if (b.shift <= zero_bits_) return {low, above, pass.counts[size_t(bin)]};
            }
            b = bracket(low, width);
        }
    }

    Pass count(const Bracket& b) {
        Pass pass = {std::vector<int64_t>(bins_of(b)), 0};
        std::mutex adding;
        const auto work = [&](int64_t begin, int64_t end) {
            for (; begin < end; begin += kElementsAtOnce)
                count_part(b, begin, std::min(end, begin + kElementsAtOnce), pass, adding);
        };
        // Each piece has counters of its own.
        over_ranges(joined_.total(), threads_, work, 1);
        return pass;
    }

    void count_part(const Bracket& b, int64_t begin, int64_t end, Pass& pass, std::mutex& adding) {
        std::vector<uint32_t> counts(pass.counts.size() * kCopies);
        joined_.over_parts(begin, end, [&](size_t i, int64_t own_begin, int64_t own_end) {
            Tally tally{};
            kernels_.histogram(tensors_[i], own_begin, own_end, b, counts.data(), tally);
            const std::lock_guard<std::mutex> lock(adding);
            pass.above += tally.above;
            largest_[i] = std::max(largest_[i], tally.largest);
        });
        const std::lock_guard<std::mutex> lock(adding);
        for (size_t bin = 0; bin < pass.counts.size(); ++bin) {
            for (int copy = 0; copy < kCopies; ++copy)
                pass.counts[bin] += counts[kCopies * bin + size_t(copy)];
        }
    }

    // The place after the last of the equals that are kept, 0 < kept < found.equals.
    int64_t cut(const Found& found, int64_t kept) const {
        std::vector<int64_t> equals(size_t((joined_.total() + kChunk - 1) / kChunk));
        std::mutex adding;
        over_ranges(joined_.total(), threads_, [&](int64_t begin, int64_t end) {
            for (int64_t next; begin < end; begin = next) {
                next = std::min(end, (begin / kChunk + 1) * kChunk);
                joined_.over_parts(begin, next, [&](size_t i, int64_t first, int64_t last) {
                    const int64_t own =
                        kernels_.count_equals(tensors_[i], first, last, found.magnitude);
                    const std::lock_guard<std::mutex> lock(adding);
                    equals[size_t(begin / kChunk)] += own;
                });
            }
        });
        size_t chunk = 0;
        for (; equals[chunk] < kept; ++chunk) kept -= equals[chunk];
        return cut_in_chunk(int64_t(chunk) * kChunk, found.magnitude, kept);
    }

    int64_t cut_in_chunk(int64_t begin, uint32_t magnitude, int64_t kept) const {
        int64_t place = 0;
        const int64_t end = std::min(joined_.total(), begin + kChunk);
        joined_.over_parts(begin, end, [&](size_t i, int64_t first, int64_t last) {
            if (kept <= 0) return;
            const int64_t at = kernels_.find_equal(tensors_[i], first, last, magnitude, kept - 1);
            if (at < last) {
                place = joined_.start(i) + at + 1;
                kept = 0;
            } else {
                kept -= kernels_.count_equals(tensors_[i], first, last, magnitude);
            }
        });
        return place;
    }

    const CpuKernels& kernels_;
    const std::vector<ValueTensor> tensors_;
    const Joined joined_;
    const int threads_;
    std::vector<uint32_t> largest_;
    int zero_bits_ = 16;
    bool halves_ = true;
    int64_t max_bins_;
};

void select_joined(const Selection& selection, const Thresholds& out, const CpuKernels& kernels,
                   int threads) {
    Search search(kernels, selection.tensors, threads);
    const Answer answer = search.run(selection.k.at(0));
    for (size_t i = 0; i < selection.tensors.size(); ++i) {
        const int64_t cut = std::max<int64_t>(0, answer.cut - search.start(i));
        out.thresholds[i] = bits_float(answer.threshold);
        out.cuts[i] = std::min(cut, selection.tensors[i].numel);
        out.largest[i] = bits_float(search.largest(i));
    }
}

void select_one(const Selection& selection, size_t i, const Thresholds& out,
                const CpuKernels& kernels, int threads) {
    Search search(kernels, {selection.tensors[i]}, threads);
    const Answer answer = search.run(selection.k.at(i));
    out.thresholds[i] = bits_float(answer.threshold);
    out.cuts[i] = answer.cut;
    out.largest[i] = bits_float(search.largest(0));
}

}  // namespace

void cpu_select(const Selection& selection, const Thresholds& out, const std::string& capability,
                int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    if (selection.joined) return select_joined(selection, out, kernels, threads);
    std::vector<size_t> small;
    int64_t elements = 0;
    for (size_t i = 0; i < selection.tensors.size(); ++i) {
        if (selection.tensors[i].numel < kShared) {
            small.push_back(i);
            elements += selection.tensors[i].numel;
        } else {
            select_one(selection, i, out, kernels, threads);
        }
    }
    const int useful = int(std::min<int64_t>(threads, elements / kElementsPerThread + 1));
    std::atomic<size_t> next{0};
    run_on_threads(useful, [&](int) {
        for (size_t turn; (turn = next++) < small.size();)
            select_one(selection, small[turn], out, kernels, 1);
    });
}

void cpu_l1_sums(const L1Sums& sums, double* out, const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    std::vector<ExactSum> totals(2 * sums.tensors.size());
    std::mutex adding;
    over_tensors(sums.tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        ExactSum all{}, kept{};
        kernels.l1_sums(sums.tensors[i], sums.masks[i], sums.seed, begin, end, all, kept);
        const std::lock_guard<std::mutex> lock(adding);
        add(totals[2 * i], all);
        add(totals[2 * i + 1], kept);
    });
    for (size_t i = 0; i < totals.size(); ++i) out[i] = total(totals[i]);
}

void cpu_histogram(const std::vector<ValueTensor>& tensors, const int64_t* lows, int shift,
                   int64_t bins, int64_t* out, const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    std::fill(out, out + int64_t(tensors.size()) * bins, 0);
    std::mutex adding;
    const auto count = [&](size_t i, int64_t begin, int64_t end) {
        const Bracket bracket = {uint32_t(lows[i]), uint32_t(bins << shift), shift};
        std::vector<uint32_t> counts(size_t(bins) * kCopies);
        Tally tally{};
        kernels.histogram(tensors[i], begin, end, bracket, counts.data(), tally);
        const std::lock_guard<std::mutex> lock(adding);
        for (size_t c = 0; c < counts.size(); ++c)
            out[int64_t(i) * bins + int64_t(c / kCopies)] += counts[c];
    };
    over_tensors(tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        for (; begin < end; begin += kElementsAtOnce)
            count(i, begin, std::min(end, begin + kElementsAtOnce));
    });
}

void cpu_equal_counts(const std::vector<ValueTensor>& tensors, const int64_t* magnitudes,
                      const int64_t* edges, int64_t ranges, int64_t* out,
                      const std::string& capability, int threads) {
    const CpuKernels& kernels = kernels_named(capability);
    std::fill(out, out + int64_t(tensors.size()) * ranges, 0);
    std::mutex adding;
    over_tensors(tensors, threads, [&](size_t i, int64_t begin, int64_t end) {
        const int64_t* own = edges + int64_t(i) * (ranges + 1);
        int64_t* counts = out + int64_t(i) * ranges;
        int64_t range = std::max<int64_t>(0, std::upper_bound(own, own + ranges, begin) - own - 1);
        for (; range < ranges && own[range] < end; ++range) {
            const int64_t first = std::max(begin, own[range]);
            const int64_t last = std::min(end, own[range + 1]);
            if (first >= last) continue;
            const int64_t count =
                kernels.count_equals(tensors[i], first, last, uint32_t(magnitudes[i]));
            const std::lock_guard<std::mutex> lock(adding);
            counts[range] += count;
        }
    });
}

}  // namespace zokern
