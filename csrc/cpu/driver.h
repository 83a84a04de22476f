// Cuts rows of a tensor into blocks that stay in the L1 cache and runs the directions over each.
//
// The including file has defined, in terms of its instruction set:
//   alignment<law>()  the elements at which `accumulate` can begin: multiples of this
//   steps<law>()      how many elements it takes at a time
//   Floats, Elements<storage>  places of values: as such, and as a tensor stores them
//   Between<From, To>  of values, between moves of which the first is from From, the last to To
//   Streamed, drain_streams()  float32 values that are written past the caches, and their end
//   accumulate<law>   to ← fma(c, z, s from) over whole steps, from one place to another
//   load_block, store_block<storage>
//   round_values<storage>  values by random halves of words; goes on to the end of a vector
//   store_words       the words of groups, a multiple of 16 of them
//   keep_below        values whose words are below a limit, 0 for the others
//   find_below        where words are below a limit
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

// All directions over `count` elements (whole steps, at most kBlock), from the full tensor's
// `element` on.
template <Law law, class From, class To>
void move(const Directions& d, uint64_t tensor_id, int64_t element, int64_t count, From from,
          To to) {
    Buffer buffer;
    const Between<From, To> between{{buffer.t}};
    const auto along = [&](int64_t k, auto here, auto there) {
        const Stream stream = make_stream(d.seed, tensor_id, uint32_t(d.draws[k]), law);
        accumulate<law>(stream, uint64_t(element), count, here, there, d.coeffs[k], d.scales[k]);
    };
    if (d.count == 1) return along(0, from, to);
    along(0, from, between);
    for (int64_t k = 1; k < d.count - 1; ++k) along(k, between, between);
    along(d.count - 1, between, to);
}

// The same from the tensor's element i on, in place or not.
template <Law law, Storage storage>
void move_elements(const Directions& d, const SweepTensor& tensor, int64_t i, int64_t element,
                   int64_t count) {
    const auto from = Elements<storage>::at(tensor.param, tensor.residual, i);
    if (tensor.out == nullptr) return move<law>(d, tensor.tensor_id, element, count, from, from);
    if constexpr (alone(storage) == Storage::fp32) {
        const Streamed to{{static_cast<float*>(tensor.out) + i}};
        if (Streamed::can_begin_at(to.values))
            return move<law>(d, tensor.tensor_id, element, count, from, to);
    }
    const auto to = Elements<alone(storage)>::at(tensor.out, nullptr, i);
    move<law>(d, tensor.tensor_id, element, count, from, to);
}

// A draw's values, in place of what was at z.
template <Law law>
void draw_values(const Stream& stream, int64_t element, int64_t count, float* z) {
    // -0 is what can be added to any z, also to +0 and -0, and leave its bits.
    for (int64_t j = 0; j < count; ++j) z[j] = -0.0f;
    accumulate<law>(stream, uint64_t(element), count, Floats{z}, Floats{z}, 1.0f, 1.0f);
}

// Elements [i, i + n) of a dense direction.
void load_dense(const DenseTensor& dense, int64_t i, int64_t n, float* values) {
    SweepTensor as_param{};
    as_param.param = const_cast<void*>(dense.data);
    switch (dense.type) {
        case Storage::bf16:
            return load_block<Storage::bf16>(as_param, i, n, values);
        case Storage::fp16:
            return load_block<Storage::fp16>(as_param, i, n, values);
        default:
            return load_block<Storage::fp32>(as_param, i, n, values);
    }
}

void zero(float* values, int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) values[j] = 0.0f;
}

// Rounds at most kBlock values, from the full tensor's `element` on, if the sweep does so
// stochastically.
template <Storage storage>
void round_block(const Directions& d, uint64_t tensor_id, int64_t element, int64_t n,
                 float* values) {
    if constexpr (rounds(storage)) {
        if (d.rounding < 0) return;
        constexpr int64_t kGroup = 8, kGroupsAtOnce = 16;
        uint32_t words[4 * (kBlock / kGroup + kGroupsAtOnce)];
        const int64_t lead = element % kGroup;
        const int64_t groups = (lead + n + kGroup - 1) / kGroup;
        const Stream stream = make_stream(d.seed, tensor_id, uint32_t(d.rounding), Law::rounding16);
        store_words(stream, uint32_t(element / kGroup),
                    (groups + kGroupsAtOnce - 1) / kGroupsAtOnce * kGroupsAtOnce, words);
        round_values<storage>(reinterpret_cast<const unsigned char*>(words) + 2 * lead, n, values);
    }
}

// Puts elements [i, i + n), the first being `element` of the full tensor, where the sweep leaves
// them.
template <Storage storage>
void finish_block(const Directions& d, const SweepTensor& tensor, int64_t i, int64_t n,
                  int64_t element, float* values) {
    if (tensor.out == nullptr) {
        round_block<storage>(d, tensor.tensor_id, element, n, values);
        return store_block<storage>(tensor, i, n, values);
    }
    SweepTensor as_param{};
    as_param.param = tensor.out;
    round_block<alone(storage)>(d, tensor.tensor_id, element, n, values);
    store_block<alone(storage)>(as_param, i, n, values);
}

// Elements [i, i + n) of a sweep that is more than a move along noise: through whole blocks of
// values, of the update u and of each direction z in turn.
template <Law law, Storage storage>
void sweep_block(const Directions& d, const SweepTensor& tensor, int64_t i, int64_t n,
                 int64_t element) {
    Buffer t, u, z;
    const int64_t lead = element % alignment<law>();
    const int64_t padded = whole_steps<law>(lead + n);
    float *values = t.t + lead, *updates = u.t + lead;
    const float* direction = z.t + lead;

    zero(t.t, 0, lead);
    zero(t.t, lead + n, padded);
    const auto move_along = [&](int64_t k, bool adds) {
        const float coeff = d.coeffs[k], scale = d.scales[k];
        const Stream stream = make_stream(d.seed, tensor.tensor_id, uint32_t(d.draws[k]), law);
        if (d.draws[k] >= 0 && !adds) {
            const Floats all = {t.t};
            accumulate<law>(stream, uint64_t(element - lead), padded, all, all, coeff, scale);
            return;
        }
        if (d.draws[k] >= 0) {
            draw_values<law>(stream, element - lead, padded, z.t);
        } else {
            load_dense(tensor.dense[~d.draws[k]], i, n, z.t + lead);
        }
        if (scale != 1.0f) {
            for (int64_t j = 0; j < n; ++j) values[j] = scale * values[j];
        }
        for (int64_t j = 0; j < n; ++j) values[j] = fma32(coeff, direction[j], values[j]);
        if (adds) {
            const float g = d.gradient[k];
            for (int64_t j = 0; j < n; ++j) updates[j] = fma32(g, direction[j], updates[j]);
        }
    };

    if (tensor.master != nullptr) {
        memcpy(values, tensor.master + i, size_t(n) * sizeof(float));
    } else {
        load_block<storage>(tensor, i, n, values);
    }
    if (d.gradient != nullptr) {
        zero(updates, 0, n);
        if (tensor.momentum != nullptr) {
            for (int64_t j = 0; j < n; ++j) updates[j] = tensor.decay * tensor.momentum[i + j];
        }
    }
    for (int64_t k = 0; k < d.rest; ++k) move_along(k, d.gradient != nullptr);
    if (d.gradient != nullptr) {
        if (tensor.momentum != nullptr) {
            memcpy(tensor.momentum + i, updates, size_t(n) * sizeof(float));
        }
        if (d.sign) {
            for (int64_t j = 0; j < n; ++j)
                updates[j] = float(updates[j] > 0.0f) - float(updates[j] < 0.0f);
        }
        for (int64_t j = 0; j < n; ++j) values[j] = fma32(tensor.step, updates[j], values[j]);
    }
    if (tensor.master != nullptr && d.rest > 0) {
        memcpy(tensor.master + i, values, size_t(n) * sizeof(float));
    }
    for (int64_t k = d.rest; k < d.count; ++k) move_along(k, false);
    finish_block<storage>(d, tensor, i, n, element, values);
}

// Local elements [i, i + n), which lie in one row, their first being `element` of the full tensor.
template <Law law, Storage storage>
void move_run(const Directions& d, const SweepTensor& tensor, int64_t i, int64_t n,
              int64_t element) {
    Buffer buffer;
    while (n > 0) {
        const int64_t lead = element % alignment<law>();
        int64_t count = n < kBlock - lead ? n : kBlock - lead;
        if (!d.plain) {
            sweep_block<law, storage>(d, tensor, i, count, element);
        } else if (residual_bytes(storage) == 0 && lead == 0 && n >= steps<law>()) {
            count = count / steps<law>() * steps<law>();
            move_elements<law, storage>(d, tensor, i, element, count);
        } else {
            const int64_t padded = whole_steps<law>(lead + count);
            zero(buffer.t, 0, lead);
            zero(buffer.t, lead + count, padded);
            load_block<storage>(tensor, i, count, buffer.t + lead);
            const Floats all = {buffer.t};
            move<law>(d, tensor.tensor_id, element - lead, padded, all, all);
            finish_block<storage>(d, tensor, i, count, element, buffer.t + lead);
        }
        i += count;
        element += count;
        n -= count;
    }
}

// The number of a tensor's row in the full tensor.
template <class Tensor>
int64_t row_number(const Tensor&, int64_t row) {
    return row;
}

int64_t row_number(const SweepTensor& tensor, int64_t row) {
    return tensor.rows == nullptr ? row : tensor.rows[row];
}

// Calls run(i, n, element) for each row's part of local elements [begin, end): n of them from i on,
// the first being `element` of the full tensor.
template <class Tensor, class Run>
void over_rows(const Tensor& tensor, int64_t begin, int64_t end, const Run& run) {
    while (begin < end) {
        const int64_t row = begin / tensor.row_length, column = begin % tensor.row_length;
        const int64_t rest = tensor.row_length - column;
        const int64_t n = rest < end - begin ? rest : end - begin;
        run(begin, n, tensor.offset + row_number(tensor, row) * tensor.row_stride + column);
        begin += n;
    }
}

template <Law law, Storage storage>
void move_range(const Directions& d, const SweepTensor& tensor, int64_t begin, int64_t end) {
    over_rows(tensor, begin, end, [&](int64_t i, int64_t n, int64_t element) {
        move_run<law, storage>(d, tensor, i, n, element);
    });
    if (tensor.out != nullptr) drain_streams();
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

// Sums of every 32nd element: the lanes are independent, and so many that a compiler makes vectors
// of them instead of one statement for each.
struct Lanes {
    static constexpr int kCount = 32;
    double high[kCount], low[kCount];
};

ZK_FN void add_lanes(double* __restrict high, double* __restrict low,
                     const double* __restrict terms) {
    for (int l = 0; l < Lanes::kCount; ++l) {
        ExactSum sum = {high[l], low[l]};
        add(sum, terms[l]);
        high[l] = sum.high;
        low[l] = sum.low;
    }
}

ZK_FN void add(ExactSum& sum, const Lanes& lanes) {
    for (int l = 0; l < Lanes::kCount; ++l) add(sum, ExactSum{lanes.high[l], lanes.low[l]});
}

// Of `n` elements, which are followed by zeros up to a multiple of Lanes::kCount.
void add_products(const float* v, const float* z, int64_t n, ExactProducts& sums) {
    constexpr int lanes = Lanes::kCount;
    Lanes vv{}, vz{}, zz{};
    double terms[lanes];
    for (int64_t j = 0; j < n; j += lanes) {
        for (int l = 0; l < lanes; ++l) terms[l] = double(v[j + l]) * double(v[j + l]);
        add_lanes(vv.high, vv.low, terms);
        for (int l = 0; l < lanes; ++l) terms[l] = double(v[j + l]) * double(z[j + l]);
        add_lanes(vz.high, vz.low, terms);
        for (int l = 0; l < lanes; ++l) terms[l] = double(z[j + l]) * double(z[j + l]);
        add_lanes(zz.high, zz.low, terms);
    }
    add(sums.vv, vv);
    add(sums.vz, vz);
    add(sums.zz, zz);
}

template <Law law>
void products_law(const Stream& stream, const ProductTensor& tensor, int64_t begin, int64_t end,
                  ExactProducts& sums) {
    Buffer v, z;
    over_rows(tensor, begin, end, [&](int64_t i, int64_t n, int64_t element) {
        while (n > 0) {
            const int64_t lead = element % alignment<law>();
            const int64_t count = n < kBlock - lead ? n : kBlock - lead;
            load_dense(tensor.vector, i, count, v.t);
            draw_values<law>(stream, element - lead, whole_steps<law>(lead + count), z.t);
            zero(v.t, count, count + Lanes::kCount);
            zero(z.t + lead, count, count + Lanes::kCount);
            add_products(v.t, z.t + lead, count, sums);
            i += count;
            element += count;
            n -= count;
        }
    });
}

void products(Law law, const Stream& stream, const ProductTensor& tensor, int64_t begin,
              int64_t end, ExactProducts& sums) {
    switch (law) {
        case Law::gauss16:
            return products_law<Law::gauss16>(stream, tensor, begin, end, sums);
        case Law::gauss32:
            return products_law<Law::gauss32>(stream, tensor, begin, end, sums);
        case Law::rademacher:
            return products_law<Law::rademacher>(stream, tensor, begin, end, sums);
        default:
            return products_law<Law::normal>(stream, tensor, begin, end, sums);
    }
}

template <Law law>
void sample_directions(const Stream& stream, int64_t begin, int64_t end, float* out) {
    Buffer buffer;
    while (begin < end) {
        const int64_t lead = begin % alignment<law>();
        const int64_t count = end - begin < kBlock - lead ? end - begin : kBlock - lead;
        const int64_t padded = whole_steps<law>(lead + count);
        draw_values<law>(stream, begin - lead, padded, buffer.t);
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
