// The kernels for any processor: the scalar arithmetic of noise.h and storage.h.
#include "kernels.h"

namespace zokern {
namespace {

template <Law law>
constexpr int64_t steps() {
    return elements_per_group(law) > 8 ? elements_per_group(law) : 8;
}

template <Law law>
constexpr int64_t alignment() {
    return steps<law>();
}

template <int bytes>
uint32_t load_bits(const unsigned char* p) {
    uint32_t bits = 0;
    memcpy(&bits, p, bytes);
    return bits;
}

// Values as such.
struct Floats {
    float* values;

    float load(int64_t at) const { return values[at]; }
    void store(int64_t at, float x) const { values[at] = x; }
};

template <class From, class To>
using Between = Floats;

struct Streamed : Floats {
    static bool can_begin_at(const float*) { return false; }
};

void drain_streams() {}

// A tensor's elements as they are stored, from one of them on.
template <Storage storage>
struct Elements {
    static constexpr int pb = param_bytes(storage), rb = residual_bytes(storage);
    unsigned char *param, *residual;

    static Elements at(void* param, void* residual, int64_t i) {
        return {static_cast<unsigned char*>(param) + i * pb,
                static_cast<unsigned char*>(residual) + i * rb};
    }
    float load(int64_t j) const {
        const Stored stored = {load_bits<pb>(param + j * pb), load_bits<rb>(residual + j * rb)};
        return load_value<storage>(stored);
    }
    void store(int64_t j, float value) const {
        const Stored stored = store_value<storage>(value);
        memcpy(param + j * pb, &stored.param, pb);
        if (rb > 0) memcpy(residual + j * rb, &stored.residual, rb);
    }
};

template <Law law, class From, class To>
void accumulate(const Stream& stream, uint64_t element, int64_t count, From from, To to,
                float coeff, float scale) {
    float z[8];
    for (int64_t i = 0; i < count; i += 8) {
        octet<law>(stream, (element + uint64_t(i)) / 8, z);
        for (int j = 0; j < 8; ++j) {
            float value = from.load(i + j);
            if (scale != 1.0f) value = scale * value;
            to.store(i + j, fma32(coeff, z[j], value));
        }
    }
}

template <Law law>
void accumulate_words(const uint32_t* words, int64_t groups, float* t) {
    constexpr int64_t per_group = elements_per_group(law);
    for (int64_t g = 0; g < groups; ++g) {
        Words group;
        memcpy(group.w, words + 4 * g, sizeof group.w);
        group_values<law>(group, t + g * per_group);
    }
}

void store_words(const Stream& stream, uint32_t group, int64_t groups, uint32_t* words) {
    for (int64_t i = 0; i < groups; ++i) {
        const Words w = group_words(stream, group + uint32_t(i));
        memcpy(words + 4 * i, w.w, sizeof w.w);
    }
}

void keep_below(const Stream& stream, uint32_t group, int64_t count, uint32_t limit,
                float* values) {
    for (int64_t i = 0; i < count; i += 4, ++group) {
        const Words words = group_words(stream, group);
        for (int j = 0; j < 4; ++j) values[i + j] = words.w[j] < limit ? values[i + j] : 0.0f;
    }
}

int64_t find_below(const Stream& stream, uint32_t group, int64_t count, uint32_t limit,
                   uint32_t* places) {
    int64_t found = 0;
    for (uint32_t i = 0; i < uint32_t(count); i += 4, ++group) {
        const Words words = group_words(stream, group);
        for (uint32_t j = 0; j < 4; ++j) {
            places[found] = i + j;
            found += words.w[j] < limit;
        }
    }
    return found;
}

template <Storage storage>
void load_block(const SweepTensor& tensor, int64_t i, int64_t n, float* t) {
    const auto elements = Elements<storage>::at(tensor.param, tensor.residual, i);
    for (int64_t j = 0; j < n; ++j) t[j] = elements.load(j);
}

template <Storage storage>
void round_values(const unsigned char* random, int64_t n, float* values) {
    for (int64_t j = 0; j < n; ++j)
        values[j] = round_by<storage>(load_bits<2>(random + 2 * j), values[j]);
}

template <Storage storage>
void store_block(const SweepTensor& tensor, int64_t i, int64_t n, const float* t) {
    const auto elements = Elements<storage>::at(tensor.param, tensor.residual, i);
    for (int64_t j = 0; j < n; ++j) elements.store(j, t[j]);
}

}  // namespace
}  // namespace zokern

#include "driver.h"

namespace zokern {
namespace {

constexpr int64_t kFiltered = 1;

int64_t filter(const float* values, int64_t n, const Bracket& bracket, uint32_t* bins,
               Tally& tally) {
    int64_t count = 0, below = 0;
    for (int64_t j = 0; j < n; ++j) {
        const uint32_t m = magnitude(values[j]), place = m - bracket.low;
        tally.largest = m > tally.largest ? m : tally.largest;
        below += m < bracket.low;
        bins[count] = place >> bracket.shift;
        count += place < bracket.width;
    }
    tally.above += n - below - count;
    return count;
}

}  // namespace
}  // namespace zokern

#include "select_kernels.h"
//
#include "merge_driver.h"
//
#include "deltas.h"

namespace zokern {
const CpuKernels kPortableKernels = {"portable", sweep,     products,   sample,
                                     values,     histogram, collect,    count_equals,
                                     find_equal, l1_sums,   merge_step, merge_deltas};
}  // namespace zokern
