// What masks keep of blocks of values, in place of which the others become 0.
#pragma once

#include "../magnitudes.h"
#include "../merging.h"
#include "driver.h"

namespace zokern {
namespace {

// Values of a block begin this many elements after those of a group of uniform32.
int64_t lead_of(int64_t element) { return element % elements_per_group(Law::uniform32); }

// Takes 0 for what the mask does not keep. There is room for a group's elements before the values.
void drop_at_random(const MaskTensor& mask, uint64_t seed, uint32_t draw, int64_t element,
                    int64_t n, float* values) {
    if (*mask.limit >= int64_t(1) << 32) return;
    const Stream stream = make_stream(seed, mask.tensor_id, draw, Law::uniform32);
    const int64_t lead = lead_of(element);
    keep_below(stream, uint32_t(element / elements_per_group(Law::uniform32)), lead + n,
               uint32_t(*mask.limit), values - lead);
}

// find_below works on whole steps, and writes whole vectors behind what it has found.
constexpr int64_t kBehindPlaces = 128;

// Where a mask at random keeps n elements: those of `places` from `begin` to `end`, in ascending
// order and counted from `lead` elements before the first.
struct Kept {
    int64_t begin, end;
    uint32_t lead;
};

Kept find_kept(const MaskTensor& mask, uint64_t seed, int64_t element, int64_t n,
               uint32_t* places) {
    const Stream stream = make_stream(seed, mask.tensor_id, uint32_t(*mask.draw), Law::uniform32);
    const uint32_t group = uint32_t(element / elements_per_group(Law::uniform32));
    Kept kept{0, 0, uint32_t(lead_of(element))};
    kept.end = find_below(stream, group, kept.lead + n, uint32_t(*mask.limit), places);
    while (kept.end > 0 && places[kept.end - 1] >= kept.lead + n) --kept.end;
    while (kept.begin < kept.end && places[kept.begin] < kept.lead) ++kept.begin;
    return kept;
}

// Those of elements i, i + 1, … that are large enough; `kept` may be where the values are.
void keep_by_threshold(const MaskTensor& mask, int64_t i, int64_t n, const float* values,
                       float* kept) {
    const uint32_t threshold = magnitude(*mask.threshold);
    const int64_t below_cut = *mask.cut - i;
    const int32_t ties = int32_t(below_cut < 0 ? 0 : below_cut < n ? below_cut : n);
    for (int32_t j = 0; j < int32_t(n); ++j) {
        const uint32_t m = magnitude(values[j]);
        const bool keep = (m > threshold) | ((m == threshold) & (j < ties));
        kept[j] = keep ? values[j] : 0.0f;
    }
}

void keep_at_random(const MaskTensor& mask, uint64_t seed, int64_t element, int64_t n,
                    const float* values, float* kept) {
    const int64_t lead = lead_of(element);
    Buffer buffer;
    memcpy(buffer.t + lead, values, size_t(n) * sizeof(float));
    drop_at_random(mask, seed, uint32_t(*mask.draw), element, n, buffer.t + lead);
    memcpy(kept, buffer.t + lead, size_t(n) * sizeof(float));
}

// Values [i, i + n), n ≤ kBlock, which lie in one row, the first being `element` of the full
// tensor: those that the mask keeps, zeros instead of the others.
void keep(const MaskTensor& mask, uint64_t seed, int64_t i, int64_t n, int64_t element,
          const float* values, float* kept) {
    if (mask.threshold != nullptr)
        keep_by_threshold(mask, i, n, values, kept);
    else
        keep_at_random(mask, seed, element, n, values, kept);
}

}  // namespace
}  // namespace zokern
