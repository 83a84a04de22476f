// Cuts rows of a tensor into blocks that stay in the L1 cache and runs the directions over each.
//
// The including file has defined, in terms of its instruction set:
//   alignment<law>()  the elements at which `accumulate` can begin: multiples of this
//   steps<law>()      how many elements it takes at a time
//   accumulate<law>   t ← fma(c, z, s t) over whole steps
//   load_block, store_block<storage>
//   store_words       the words of groups, a multiple of 16 of them
//   accumulate_words  t ← t + z of given words
#pragma once

#include "kernels.h"

namespace zokern {
namespace {

constexpr int64_t kBlock = 2048;
// A step begins at most 127 elements before a block and ends at most a step behind it.
constexpr int64_t kPadded = kBlock + 128 + 1024;

struct alignas(64) Buffer {
    float t[kPadded];
};

template <Law law>
int64_t whole_steps(int64_t n) {
    return (n + steps<law>() - 1) / steps<law>() * steps<law>();
}

// All directions over `count` elements (whole steps) at t, from the full tensor's `element` on.
template <Law law>
void move(const Directions& d, uint64_t tensor_id, int64_t element, int64_t count, float* t) {
    for (int64_t k = 0; k < d.count; ++k) {
        const Stream stream = make_stream(d.seed, tensor_id, d.draws[k], law);
        accumulate<law>(stream, uint64_t(element), count, t, d.coeffs[k], d.scales[k]);
    }
}

// Local elements [i, i + n), which lie in one row, their first being `element` of the full tensor.
template <Law law, Storage storage>
void move_run(const Directions& d, const SweepTensor& tensor, int64_t i, int64_t n,
              int64_t element) {
    Buffer buffer;
    while (n > 0) {
        const int64_t lead = element % alignment<law>();
        int64_t count;
        if (storage == Storage::fp32 && lead == 0 && n >= steps<law>()) {
            const int64_t most = n < kBlock ? n : kBlock;
            count = most / steps<law>() * steps<law>();
            move<law>(d, tensor.tensor_id, element, count, static_cast<float*>(tensor.param) + i);
        } else {
            count = n < kBlock - lead ? n : kBlock - lead;
            const int64_t padded = whole_steps<law>(lead + count);
            for (int64_t j = 0; j < lead; ++j) buffer.t[j] = 0.0f;
            for (int64_t j = lead + count; j < padded; ++j) buffer.t[j] = 0.0f;
            load_block<storage>(tensor, i, count, buffer.t + lead);
            move<law>(d, tensor.tensor_id, element - lead, padded, buffer.t);
            store_block<storage>(tensor, i, count, buffer.t + lead);
        }
        i += count;
        element += count;
        n -= count;
    }
}

template <Law law, Storage storage>
void move_range(const Directions& d, const SweepTensor& tensor, int64_t begin, int64_t end) {
    while (begin < end) {
        const int64_t row = begin / tensor.row_length, column = begin % tensor.row_length;
        const int64_t rest = tensor.row_length - column;
        const int64_t n = rest < end - begin ? rest : end - begin;
        move_run<law, storage>(d, tensor, begin, n,
                               tensor.offset + row * tensor.row_stride + column);
        begin += n;
    }
}

template <Law law>
void sweep_law(const Directions& d, const SweepTensor& tensor, int64_t begin, int64_t end) {
    switch (tensor.storage) {
        case Storage::fp32:
            return move_range<law, Storage::fp32>(d, tensor, begin, end);
        case Storage::bf16:
            return move_range<law, Storage::bf16>(d, tensor, begin, end);
        case Storage::fp16:
            return move_range<law, Storage::fp16>(d, tensor, begin, end);
        case Storage::bf16_split16:
            return move_range<law, Storage::bf16_split16>(d, tensor, begin, end);
        case Storage::bf16_split8:
            return move_range<law, Storage::bf16_split8>(d, tensor, begin, end);
        case Storage::fp16_split:
            return move_range<law, Storage::fp16_split>(d, tensor, begin, end);
    }
}

void sweep(const Directions& d, const SweepTensor& tensor, int64_t begin, int64_t end) {
    switch (d.law) {
        case Law::gauss16:
            return sweep_law<Law::gauss16>(d, tensor, begin, end);
        case Law::gauss32:
            return sweep_law<Law::gauss32>(d, tensor, begin, end);
        case Law::rademacher:
            return sweep_law<Law::rademacher>(d, tensor, begin, end);
        default:
            return sweep_law<Law::normal>(d, tensor, begin, end);
    }
}

template <Law law>
void sample_directions(const Stream& stream, int64_t begin, int64_t end, float* out) {
    Buffer buffer;
    while (begin < end) {
        const int64_t lead = begin % alignment<law>();
        const int64_t count = end - begin < kBlock - lead ? end - begin : kBlock - lead;
        const int64_t padded = whole_steps<law>(lead + count);
        // -0 is what can be added to any z, also to +0 and -0, and leave its bits.
        for (int64_t j = 0; j < padded; ++j) buffer.t[j] = -0.0f;
        accumulate<law>(stream, uint64_t(begin - lead), padded, buffer.t, 1.0f, 1.0f);
        memcpy(out, buffer.t + lead, size_t(count) * sizeof(float));
        begin += count;
        out += count;
    }
}

ZK_FN int64_t word_value(Law law, const uint32_t* words, int64_t element) {
    if (law == Law::uniform32) return words[element];
    return (words[element / 2] >> (16 * (element % 2))) & 0xFFFFu;
}

void sample_words(Law law, const Stream& stream, int64_t begin, int64_t end, int64_t* out) {
    constexpr int64_t kGroupsAtOnce = 64;
    uint32_t words[4 * kGroupsAtOnce];
    const int64_t per_group = elements_per_group(law);
    while (begin < end) {
        const int64_t group = begin / per_group, lead = begin % per_group;
        int64_t count = kGroupsAtOnce * per_group - lead;
        if (end - begin < count) count = end - begin;
        store_words(stream, uint32_t(group), kGroupsAtOnce, words);
        for (int64_t j = 0; j < count; ++j) out[j] = word_value(law, words, lead + j);
        begin += count;
        out += count;
    }
}

void sample(Law law, const Stream& stream, int64_t begin, int64_t end, void* out) {
    float* floats = static_cast<float*>(out);
    switch (law) {
        case Law::gauss16:
            return sample_directions<Law::gauss16>(stream, begin, end, floats);
        case Law::gauss32:
            return sample_directions<Law::gauss32>(stream, begin, end, floats);
        case Law::rademacher:
            return sample_directions<Law::rademacher>(stream, begin, end, floats);
        case Law::normal:
            return sample_directions<Law::normal>(stream, begin, end, floats);
        default:
            return sample_words(law, stream, begin, end, static_cast<int64_t*>(out));
    }
}

void values(Law law, const uint32_t* words, int64_t groups, void* out) {
    const int64_t count = groups * elements_per_group(law);
    if (law == Law::uniform32 || law == Law::rounding16) {
        int64_t* numbers = static_cast<int64_t*>(out);
        for (int64_t j = 0; j < count; ++j) numbers[j] = word_value(law, words, j);
        return;
    }
    float* floats = static_cast<float*>(out);
    for (int64_t j = 0; j < count; ++j) floats[j] = -0.0f;
    switch (law) {
        case Law::gauss16:
            return accumulate_words<Law::gauss16>(words, groups, floats);
        case Law::gauss32:
            return accumulate_words<Law::gauss32>(words, groups, floats);
        case Law::rademacher:
            return accumulate_words<Law::rademacher>(words, groups, floats);
        default:
            return accumulate_words<Law::normal>(words, groups, floats);
    }
}

}  // namespace
}  // namespace zokern
