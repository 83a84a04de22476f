// A τ of which only the elements that are not 0 are kept; SparseTau of zokern/merging.py.
#pragma once

#include "merging.h"

namespace zokern {

constexpr int64_t kBucket = 1 << 16;  // elements whose sparse places are counted together

// The first of the sparse elements from `begin` on whose place is not below `place`.
ZK_FN int64_t find_place(const TauTensor& tau, int64_t begin, int64_t end, uint32_t place) {
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (tau.places[middle] < place)
            begin = middle + 1;
        else
            end = middle;
    }
    return begin;
}

ZK_FN float sparse_value(const DenseTensor& values, int64_t k) {
    if (values.type == Storage::fp32) return static_cast<const float*>(values.data)[k];
    const uint32_t bits = static_cast<const uint16_t*>(values.data)[k];
    return values.type == Storage::bf16 ? from_bf16(bits) : from_fp16(bits);
}

}  // namespace zokern
