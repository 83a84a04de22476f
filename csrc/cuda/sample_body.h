// The kernel that writes a draw's values.
#pragma once

#include <type_traits>

#include "context.h"
#include "plan.h"

namespace zokern {

template <Law law>
using SampleValue =
    std::conditional_t<law == Law::uniform32 || law == Law::rounding16, int64_t, float>;

// Elements 8·index … 8·index + 7.
template <Law law>
ZK_FN void sample_octet(const Stream& stream, uint64_t index, SampleValue<law>* values) {
    if constexpr (law == Law::uniform32) {
        ZK_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Words words = group_words(stream, uint32_t(2 * index) + half);
            ZK_UNROLL
            for (int j = 0; j < 4; ++j) values[4 * half + j] = words.w[j];
        }
    } else if constexpr (law == Law::rounding16) {
        const Words words = group_words(stream, uint32_t(index));
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
            values[2 * j] = words.w[j] & 0xFFFFu;
            values[2 * j + 1] = words.w[j] >> 16;
        }
    } else {
        octet<law>(stream, index, values);
    }
}

template <Law law, class Context>
ZK_FN void sample_body(Context at, const SampleBatch& batch) {
    using Value = SampleValue<law>;
    struct alignas(16) Vector {
        Value values[16 / sizeof(Value)];
    };
    constexpr int per_vector = sizeof(Vector) / sizeof(Value);

    const uint64_t unit = uint64_t(at.block()) * kThreads + at.thread();
    Value values[8];
    sample_octet<law>(batch.stream, batch.offset / 8 + unit, values);
    // Of the octet's first element, in the output; wraps where that element lies before it.
    const uint64_t first = 8 * unit - batch.offset % 8;
    Value* out = static_cast<Value*>(batch.out) + first;
    const bool full = first < batch.numel && batch.numel - first >= 8;
    if (full && reinterpret_cast<uintptr_t>(out) % sizeof(Vector) == 0) {
        ZK_UNROLL
        for (int i = 0; i < 8; i += per_vector) {
            Vector vector;
            ZK_UNROLL
            for (int j = 0; j < per_vector; ++j) vector.values[j] = values[i + j];
            reinterpret_cast<Vector*>(out)[i / per_vector] = vector;
        }
    } else {
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            if (first + j < batch.numel) out[j] = values[j];
        }
    }
}

}  // namespace zokern
