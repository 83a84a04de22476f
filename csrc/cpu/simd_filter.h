// The filter of magnitudes in terms of `Simd`.
#pragma once

#include "../magnitudes.h"
#include "kernels.h"

namespace zokern {
namespace {

constexpr int64_t kFiltered = Simd::kWidth;

int64_t filter(const float* values, int64_t n, const Bracket& bracket, uint32_t* bins,
               Tally& tally) {
    const I low = Simd::set_i(bracket.low), width = Simd::set_i(bracket.width);
    const I magnitudes = Simd::set_i(kMagnitude);
    I largest = Simd::set_i(tally.largest);
    int64_t count = 0, below = 0;
    for (int64_t j = 0; j < n; j += Simd::kWidth) {
        const I m = Simd::and_i(Simd::load_i(values + j), magnitudes);
        const I place = Simd::sub_i(m, low);
        largest = Simd::max_signed(largest, m);
        below += Simd::count(Simd::less_signed(m, low));
        const auto is_inside = Simd::less_unsigned(place, width);
        // Stores across cache lines cost more than a jump that is mostly foreseen.
        if (!Simd::any(is_inside)) continue;
        const I bin = Simd::shr_all(place, bracket.shift);
        count += Simd::compress(bins + count, is_inside, bin);
    }
    tally.above += n - below - count;
    uint32_t lanes[Simd::kWidth];
    Simd::store_i(lanes, largest);
    for (const uint32_t lane : lanes) tally.largest = lane > tally.largest ? lane : tally.largest;
    return count;
}

}  // namespace
}  // namespace zokern
