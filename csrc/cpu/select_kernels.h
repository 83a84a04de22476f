// Histograms of magnitudes, the count of equals, L1 sums: blocks of values in the L1 cache.
//
// The including file has defined `filter` for whole vectors of kFiltered values.
#pragma once

#include "masks.h"
#include "values.h"

namespace zokern {
namespace {

// The bins of all values whose magnitudes lie in the bracket, into `bins`; how many there are.
int64_t filter_block(const float* values, int64_t n, const Bracket& bracket, uint32_t* bins,
                     Tally& tally) {
    const int64_t whole = n / kFiltered * kFiltered;
    int64_t count = filter(values, whole, bracket, bins, tally);
    for (int64_t j = whole; j < n; ++j) {
        const uint32_t m = magnitude(values[j]), place = m - bracket.low;
        tally.largest = m > tally.largest ? m : tally.largest;
        tally.above += m >= bracket.low && place >= bracket.width;
        bins[count] = place >> bracket.shift;
        count += place < bracket.width;
    }
    return count;
}

// Each bin has kCopies counters side by side, which neighbors take in turn: a counter that is
// counted up again and again would wait each time for what was stored there last.
void count_bins(const uint32_t* bins, int64_t n, uint32_t* counts) {
    static_assert(kCopies == 4, "copies of a bin");
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        ++counts[4 * size_t(bins[j])];
        ++counts[4 * size_t(bins[j + 1]) + 1];
        ++counts[4 * size_t(bins[j + 2]) + 2];
        ++counts[4 * size_t(bins[j + 3]) + 3];
    }
    for (; j < n; ++j) ++counts[4 * size_t(bins[j])];
}

// Calls run(i, n, values) for blocks of elements [begin, end).
template <class Run>
void over_blocks(const ValueTensor& tensor, int64_t begin, int64_t end, const Run& run) {
    Buffer buffer;
    for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = end - i < kBlock ? end - i : kBlock;
        run(i, n, values_of(tensor, i, n, buffer.t));
    }
}

void histogram(const ValueTensor& tensor, int64_t begin, int64_t end, const Bracket& bracket,
               uint32_t* counts, Tally& tally) {
    alignas(64) uint32_t bins[kBlock + 64];
    over_blocks(tensor, begin, end, [&](int64_t, int64_t n, const float* values) {
        count_bins(bins, filter_block(values, n, bracket, bins, tally), counts);
    });
}

bool collect(const ValueTensor& tensor, int64_t begin, int64_t end, const Bracket& bracket,
             uint32_t* bins, int64_t room, int64_t& count, Tally& tally) {
    static_assert(kBlock + 64 <= kRoomOfBlock, "of whole vectors");
    bool fits = true;
    over_blocks(tensor, begin, end, [&](int64_t, int64_t n, const float* values) {
        fits = fits && room - count >= kRoomOfBlock;
        if (fits) count += filter_block(values, n, bracket, bins + count, tally);
    });
    return fits;
}

int64_t count_equals(const ValueTensor& tensor, int64_t begin, int64_t end, uint32_t wanted) {
    int64_t count = 0;
    over_blocks(tensor, begin, end, [&](int64_t, int64_t n, const float* values) {
        int32_t own = 0;
        for (int64_t j = 0; j < n; ++j) own += magnitude(values[j]) == wanted;
        count += own;
    });
    return count;
}

int64_t find_equal(const ValueTensor& tensor, int64_t begin, int64_t end, uint32_t wanted,
                   int64_t rank) {
    int64_t found = end;
    over_blocks(tensor, begin, end, [&](int64_t i, int64_t n, const float* values) {
        for (int64_t j = 0; j < n && rank >= 0; ++j) {
            if (magnitude(values[j]) == wanted && rank-- == 0) found = i + j;
        }
    });
    return found;
}

// Of `n` magnitudes, which are followed by zeros up to a multiple of Lanes::kCount.
void add_magnitudes(const float* values, int64_t n, Lanes& lanes) {
    double terms[Lanes::kCount];
    for (int64_t j = 0; j < n; j += Lanes::kCount) {
        for (int l = 0; l < Lanes::kCount; ++l) terms[l] = __builtin_fabs(double(values[j + l]));
        add_lanes(lanes.high, lanes.low, terms);
    }
}

void l1_sums(const ValueTensor& tensor, const MaskTensor& mask, uint64_t seed, int64_t begin,
             int64_t end, ExactSum& all, ExactSum& kept) {
    Buffer buffer, own;
    Lanes all_lanes{}, kept_lanes{};
    over_rows(mask, begin, end, [&](int64_t i, int64_t n, int64_t element) {
        while (n > 0) {
            const int64_t count = n < kBlock ? n : kBlock;
            const float* values = values_of(tensor, i, count, buffer.t);
            keep(mask, seed, i, count, element, values, own.t);
            if (values != buffer.t) memcpy(buffer.t, values, size_t(count) * sizeof(float));
            zero(buffer.t, count, count + Lanes::kCount);
            zero(own.t, count, count + Lanes::kCount);
            add_magnitudes(buffer.t, count, all_lanes);
            add_magnitudes(own.t, count, kept_lanes);
            i += count;
            element += count;
            n -= count;
        }
    });
    add(all, all_lanes);
    add(kept, kept_lanes);
}

}  // namespace
}  // namespace zokern
