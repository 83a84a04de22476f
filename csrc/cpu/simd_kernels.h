// The kernels in terms of `Simd`, which the including file has chosen.
#pragma once

#include <type_traits>

#include "kernels.h"

namespace zokern {
namespace {

using F = Simd::F;
using I = Simd::I;

// The words of Simd::kGroups groups, in memory order in two vectors.
struct Rows {
    I first, second;
};

// Philox of consecutive groups of a stream: their counters differ in c0 alone, so that half of what
// the first two rounds compute is the same for all of them.
class PhiloxSource {
  public:
    explicit PhiloxSource(const Stream& stream) {
        uint32_t key0 = stream.key0, key1 = stream.key1;
        for (int round = 0; round < kRounds; ++round) {
            keys0_[round] = Simd::set_i(key0);
            keys1_[round] = Simd::set_i(key1);
            key0 += kPhiloxW0;
            key1 += kPhiloxW1;
        }
        const uint64_t first = uint64_t(stream.c2) * kPhiloxM1;
        const uint32_t c0 = uint32_t(first >> 32) ^ stream.c1 ^ stream.key0;
        const uint64_t second = uint64_t(c0) * kPhiloxM0;
        keys1_[0] = Simd::set_i(stream.draw ^ stream.key1);
        keys0_[1] = Simd::xor_i(keys0_[1], Simd::set_i(uint32_t(first)));
        keys1_[1] = Simd::xor_i(keys1_[1], Simd::set_i(uint32_t(second >> 32)));
        keys1_[2] = Simd::xor_i(keys1_[2], Simd::set_i(uint32_t(second)));
    }

    Rows rows(uint32_t group) const {
        const I m0 = Simd::set_i(kPhiloxM0), m1 = Simd::set_i(kPhiloxM1);
        I p0 = Simd::mul_wide(Simd::add_i(Simd::set_i(group), Simd::group_order()), m0);
        I p1 = Simd::mul_wide(Simd::xor_i(Simd::high_half(p0), keys1_[0]), m1);
        I c0 = Simd::xor_i(Simd::high_half(p1), keys0_[1]), c1 = p1;
        I c2 = Simd::xor_i(p0, keys1_[1]), c3 = Simd::set_i(0);
#pragma GCC unroll 10
        for (int round = 2; round < kRounds; ++round) {
            p0 = Simd::mul_wide(c0, m0);
            p1 = Simd::mul_wide(c2, m1);
            c0 = Simd::xor3(Simd::high_half(p1), c1, keys0_[round]);
            c2 = Simd::xor3(Simd::high_half(p0), c3, keys1_[round]);
            c1 = p1;
            c3 = p0;
        }
        Rows rows;
        Simd::rows(c0, c1, c2, c3, rows.first, rows.second);
        return rows;
    }

  private:
    static constexpr int kRounds = 10;

    // The first ones with what all groups have in common.
    I keys0_[kRounds], keys1_[kRounds];
};

struct MemorySource {
    const uint32_t* words;

    Rows rows(uint32_t group) const {
        return {Simd::load_i(words + 4 * group), Simd::load_i(words + 4 * group + Simd::kWidth)};
    }
};

// Values as such.
struct Floats {
    static constexpr bool kHalves = false;
    float* values;

    F load(int64_t at) const { return Simd::load(values + at); }
    void store(int64_t at, F x) const { Simd::store(values + at, x); }
};

// Values between two moves of `Elements` with kHalves, in the order in which those take them apart.
struct Pairs : Floats {
    static constexpr bool kHalves = true;

    void load_pair(int64_t at, F& even, F& odd) const {
        even = load(at);
        odd = load(at + Simd::kWidth);
    }
    void store_pair(int64_t at, F even, F odd) const {
        store(at, even);
        store(at + Simd::kWidth, odd);
    }
};

template <class From, class To>
using Between = std::conditional_t<From::kHalves && To::kHalves, Pairs, Floats>;

template <Storage storage>
F load_vector(const unsigned char* param, const unsigned char* residual) {
    if constexpr (storage == Storage::fp32) {
        return Simd::as_float(Simd::load_i(param));
    } else if constexpr (storage == Storage::fp16) {
        return Simd::load_fp16(param);
    } else if constexpr (storage == Storage::fp16_split) {
        return Simd::fma(Simd::load_fp16(residual), Simd::set(0x1p-11f), Simd::load_fp16(param));
    } else {
        I bits = Simd::template shl<16>(Simd::load_u16(param));
        if constexpr (storage == Storage::bf16_split16) {
            const I high = Simd::template shl<16>(Simd::load_u16(residual));
            bits = Simd::add_i(bits, Simd::template sar<16>(high));
        } else if constexpr (storage == Storage::bf16_split8) {
            const I high = Simd::template shl<24>(Simd::load_u8(residual));
            bits = Simd::add_i(bits, Simd::template sar<16>(high));
        }
        return Simd::as_float(bits);
    }
}

// Infinities and NaN lose nothing but a NaN's payload in bfloat16; a carry must not change them.
I to_bf16_bits(I bits, Simd::Mask special) {
    const I rounded = Simd::template shr<16>(Simd::add_i(bits, Simd::set_i(0x8000u)));
    const I mantissa = Simd::and_i(bits, Simd::set_i(0x007FFFFFu));
    const I quiet = Simd::select(Simd::nonzero(mantissa), Simd::set_i(0x40u), Simd::set_i(0));
    return Simd::select(special, Simd::or_i(Simd::template shr<16>(bits), quiet), rounded);
}

// To nearest, ties to even.
I to_nearest_bf16_bits(F value) {
    const I bits = Simd::as_int(value), high = Simd::template shr<16>(bits);
    const I last = Simd::and_i(high, Simd::set_i(1));
    const I rounded = Simd::add_i(bits, Simd::add_i(last, Simd::set_i(0x7FFFu)));
    return Simd::select(Simd::is_nan(value), Simd::or_i(high, Simd::set_i(0x40u)),
                        Simd::template shr<16>(rounded));
}

template <Storage storage>
void store_vector(unsigned char* param, unsigned char* residual, F value) {
    if constexpr (storage == Storage::fp32) {
        Simd::store_i(param, Simd::as_int(value));
    } else if constexpr (storage == Storage::fp16) {
        Simd::store_fp16(param, value);
    } else if constexpr (storage == Storage::fp16_split) {
        const F rounded = Simd::round_to_fp16(value);
        const I exponent = Simd::set_i(0x7F800000u);
        const auto special = Simd::equal(Simd::and_i(Simd::as_int(rounded), exponent), exponent);
        const F rest = Simd::mul(Simd::sub(value, rounded), Simd::set(0x1p11f));
        Simd::store_fp16(param, value);
        Simd::store_fp16(residual,
                         Simd::as_float(Simd::select(special, Simd::set_i(0), Simd::as_int(rest))));
    } else if constexpr (storage == Storage::bf16) {
        Simd::store_u16(param, to_nearest_bf16_bits(value));
    } else {
        I bits = Simd::as_int(value);
        const I exponent = Simd::set_i(0x7F800000u);
        const auto special = Simd::equal(Simd::and_i(bits, exponent), exponent);
        if constexpr (storage == Storage::bf16_split8) {
            const I nearest =
                Simd::and_i(Simd::add_i(bits, Simd::set_i(0x80u)), Simd::set_i(0xFFFFFF00u));
            bits = Simd::select(special, bits, nearest);
        }
        const I high = to_bf16_bits(bits, special);
        const I difference = Simd::sub_i(bits, Simd::template shl<16>(high));
        const I rest = Simd::select(special, Simd::set_i(0), difference);
        Simd::store_u16(param, high);
        if constexpr (storage == Storage::bf16_split8) {
            Simd::store_u8(residual, Simd::template shr<8>(rest));
        } else {
            Simd::store_u16(residual, rest);
        }
    }
}

// A tensor's elements as they are stored, from one of them on.
template <Storage storage>
struct Elements {
    // Two of them in a lane: even and odd ones are taken apart sooner than halves of a vector.
    static constexpr bool kHalves = storage == Storage::bf16;
    unsigned char *param, *residual;

    static Elements at(void* param, void* residual, int64_t i) {
        return {static_cast<unsigned char*>(param) + i * param_bytes(storage),
                static_cast<unsigned char*>(residual) + i * residual_bytes(storage)};
    }
    F load(int64_t j) const {
        return load_vector<storage>(param + j * param_bytes(storage),
                                    residual + j * residual_bytes(storage));
    }
    void store(int64_t j, F value) const {
        store_vector<storage>(param + j * param_bytes(storage),
                              residual + j * residual_bytes(storage), value);
    }
    void load_pair(int64_t j, F& even, F& odd) const {
        const I bits = Simd::load_i(param + j * param_bytes(storage));
        even = Simd::as_float(Simd::template shl<16>(bits));
        odd = Simd::as_float(Simd::and_i(bits, Simd::set_i(0xFFFF0000u)));
    }
    // NaN have come from bfloat16 or been made here, of infinities: their lower halves are 0, and
    // nothing rounds them up to another number.
    void store_pair(int64_t j, F even, F odd) const {
        const I bits = Simd::upper_halves(Simd::as_int(even), Simd::as_int(odd));
        const I rest = Simd::lower_halves(Simd::as_int(even), Simd::as_int(odd));
        Simd::store_i(param + j * param_bytes(storage), Simd::round_halves(bits, rest));
    }
};

// A float32 tensor that is written out of place: past the caches. Where the cores that read it next
// do not share one, each of its lines would lie in several caches by the next time that it is
// written, and be called back from there, one after another, which takes ten times as long.
struct Streamed : Floats {
    static bool can_begin_at(const float* values) { return uintptr_t(values) % sizeof(I) == 0; }

    void store(int64_t at, F x) const { Simd::stream_i(values + at, Simd::as_int(x)); }
};

void drain_streams() { Simd::drain(); }

// Takes the values at `at` of one place, moved along z, to the same of another, or itself.
template <class From, class To>
struct Move {
    From from;
    To to;
    F coeff, scale;
    bool scaled;

    F moved(F value, F z) const {
        if (scaled) value = Simd::mul(scale, value);
        return Simd::fma(coeff, z, value);
    }
    void operator()(int64_t at, F z) const { to.store(at, moved(from.load(at), z)); }

    // Of two vectors of values, those with even places and those with odd ones.
    void pair(int64_t at, F even, F odd) const {
        if constexpr (From::kHalves && To::kHalves) {
            F a, b;
            from.load_pair(at, a, b);
            to.store_pair(at, moved(a, even), moved(b, odd));
        } else {
            F first, second;
            Simd::interleave(even, odd, first, second);
            (*this)(at, first);
            (*this)(at + Simd::kWidth, second);
        }
    }
};

// z = x q(x²) of sums less the centre, for the sums of four products in each lane.
template <Law law>
F gauss(I bytes) {
    constexpr Gauss g = law == Law::gauss16 ? gauss16() : gauss32();
    const I weights = Simd::set_i(g.weights);
    // A float whose last bit is the law's scale: the sum of products, added to its bits, is scaled
    // without being converted, and everything is exact.
    constexpr float bias = 0x1p23f * g.scale;
    const I start = Simd::as_int(Simd::set(bias));
    // The dot product takes unsigned by signed bytes: weights reach 251 under gauss16, the data 255
    // under gauss32.
    const I sum =
        law == Law::gauss16 ? Simd::dot(start, weights, bytes) : Simd::dot(start, bytes, weights);
    const F x = Simd::sub(Simd::as_float(sum), Simd::set(bias + float(g.centre) * g.scale));
    const F s = Simd::mul(x, x);
    F q = Simd::fma(Simd::set(g.c4), s, Simd::set(g.c3));
    q = Simd::fma(q, s, Simd::set(g.c2));
    q = Simd::fma(q, s, Simd::set(g.c1));
    q = Simd::fma(q, s, Simd::set(g.c0));
    return Simd::mul(q, x);
}

template <int n>
F horner(const float (&coefficients)[n], F x) {
    F total = Simd::set(coefficients[0]);
#pragma GCC unroll 16
    for (int i = 1; i < n; ++i) total = Simd::fma(total, x, Simd::set(coefficients[i]));
    return total;
}

F normal_radius(I word) {
    const I n = Simd::or_i(word, Simd::set_i(1));
    const I zeros = Simd::leading_zeros(n);
    const I m = Simd::shl_each(n, zeros);
    const I low = Simd::select(Simd::less_unsigned(m, Simd::set_i(kSqrtHalf)), Simd::set_i(1),
                               Simd::set_i(0));
    const F r = Simd::mul(Simd::to_float(Simd::shl_each(m, low)), Simd::set(0x1p-32f));
    const F log1p = Simd::fma(Simd::mul(r, r), horner(kLog1p, r), r);
    const F halvings = Simd::to_float(Simd::add_i(zeros, low));
    const F minus = Simd::as_float(Simd::xor_i(Simd::as_int(log1p), Simd::set_i(0x80000000u)));
    const F minus_log = Simd::fma(halvings, Simd::set(kLn2), minus);
    return Simd::sqrt(Simd::add(minus_log, minus_log));
}

void normal_angle(I word, F& cos, F& sin) {
    const I shifted = Simd::add_i(word, Simd::set_i(0x20000000u));
    const I quarter = Simd::template shr<30>(shifted);
    const I rest = Simd::sub_i(word, Simd::template shl<30>(quarter));
    const F t = Simd::mul(Simd::to_float(rest), Simd::set(0x1p-29f));
    const F s = Simd::mul(t, t);
    const F small = Simd::mul(t, horner(kSin, s));
    const I sine = Simd::as_int(Simd::fma(t, Simd::set(kQuarterPi), small));
    const I cosine = Simd::as_int(horner(kCos, s));
    const auto swap = Simd::nonzero(Simd::and_i(quarter, Simd::set_i(1)));
    const I two = Simd::set_i(2);
    const I plus_one = Simd::add_i(quarter, Simd::set_i(1));
    const I cos_sign = Simd::template shl<30>(Simd::and_i(plus_one, two));
    const I sin_sign = Simd::template shl<30>(Simd::and_i(quarter, two));
    cos = Simd::as_float(Simd::xor_i(Simd::select(swap, sine, cosine), cos_sign));
    sin = Simd::as_float(Simd::xor_i(Simd::select(swap, cosine, sine), sin_sign));
}

template <Law law, class M>
void move_rows(const Rows& rows, int64_t at, const M& move) {
    constexpr int w = Simd::kWidth;
    if constexpr (law == Law::gauss16) {
        const I nibbles = Simd::set_i(0x0F0F0F0Fu);
        for (const I& row : {rows.first, rows.second}) {
            const F even = gauss<law>(Simd::and_i(row, nibbles));
            const F odd = gauss<law>(Simd::and_i(Simd::template shr<4>(row), nibbles));
            move.pair(at, even, odd);
            at += 2 * w;
        }
    } else if constexpr (law == Law::gauss32) {
        move(at, gauss<law>(rows.first));
        move(at + w, gauss<law>(rows.second));
    } else if constexpr (law == Law::normal) {
        const F radius = normal_radius(Simd::even(rows.first, rows.second));
        F cos, sin;
        normal_angle(Simd::odd(rows.first, rows.second), cos, sin);
        cos = Simd::mul(radius, cos);
        sin = Simd::mul(radius, sin);
        move(at, Simd::zip_low(cos, sin));
        move(at + w, Simd::zip_high(cos, sin));
    } else {
        unsigned char bits[2 * sizeof(I)];
        Simd::store_i(bits, rows.first);
        Simd::store_i(bits + sizeof(I), rows.second);
        const I one = Simd::as_int(Simd::set(1.0f));
        for (int i = 0; i < int(sizeof bits) * 8; i += w) {
            move(at + i, Simd::as_float(Simd::or_i(Simd::sign_bits(bits + i / 8), one)));
        }
    }
}

template <Law law>
constexpr int64_t steps() {
    return Simd::kGroups * elements_per_group(law);
}

template <Law law>
constexpr int64_t alignment() {
    return elements_per_group(law);
}

template <Law law, class From, class To>
void accumulate(const Stream& stream, uint64_t element, int64_t count, From from, To to,
                float coeff, float scale) {
    const PhiloxSource source(stream);
    const Move<From, To> move{from, to, Simd::set(coeff), Simd::set(scale), scale != 1.0f};
    uint32_t group = uint32_t(element / elements_per_group(law));
    // One step ahead: the words of the next values are a long chain of operations, each of which
    // waits for the one before, and these move in the meantime.
    Rows rows = source.rows(group);
    for (int64_t i = 0; i < count; i += steps<law>()) {
        group += Simd::kGroups;
        const Rows next = source.rows(group);
        move_rows<law>(rows, i, move);
        rows = next;
    }
}

template <Law law>
void accumulate_words(const uint32_t* words, int64_t groups, float* t) {
    const MemorySource source{words};
    const Floats values = {t};
    const Move<Floats, Floats> move{values, values, Simd::set(1.0f), Simd::set(1.0f), false};
    for (int64_t group = 0; group < groups; group += Simd::kGroups) {
        move_rows<law>(source.rows(uint32_t(group)), group * elements_per_group(law), move);
    }
}

void store_words(const Stream& stream, uint32_t group, int64_t groups, uint32_t* words) {
    const PhiloxSource source(stream);
    for (int64_t i = 0; i < groups; i += Simd::kGroups) {
        const Rows rows = source.rows(group + uint32_t(i));
        Simd::store_i(words + 4 * i, rows.first);
        Simd::store_i(words + 4 * i + Simd::kWidth, rows.second);
    }
}

// Takes 0 for those of `count` values whose words of uniform32 are not below the limit; the first
// is that of `group`. Goes on to the end of a step.
void keep_below(const Stream& stream, uint32_t group, int64_t count, uint32_t limit,
                float* values) {
    const PhiloxSource source(stream);
    const I bound = Simd::set_i(limit), nothing = Simd::set_i(0);
    const auto keep = [&](I words, float* at) {
        const I kept = Simd::as_int(Simd::load(at));
        const I left = Simd::select(Simd::less_unsigned(words, bound), kept, nothing);
        Simd::store(at, Simd::as_float(left));
    };
    for (int64_t i = 0; i < count; i += 2 * Simd::kWidth, group += Simd::kGroups) {
        const Rows rows = source.rows(group);
        keep(rows.first, values + i);
        keep(rows.second, values + i + Simd::kWidth);
    }
}

// Where those words are, counted from the group's first: how many, in ascending order. Behind them
// there is room for a vector.
int64_t find_below(const Stream& stream, uint32_t group, int64_t count, uint32_t limit,
                   uint32_t* places) {
    const PhiloxSource source(stream);
    const I bound = Simd::set_i(limit);
    uint32_t lanes[Simd::kWidth];
    for (uint32_t lane = 0; lane < uint32_t(Simd::kWidth); ++lane) lanes[lane] = lane;
    I at = Simd::load_i(lanes);
    int64_t found = 0;
    const auto find = [&](I words) {
        found += Simd::compress(places + found, Simd::less_unsigned(words, bound), at);
        at = Simd::add_i(at, Simd::set_i(Simd::kWidth));
    };
    for (int64_t i = 0; i < count; i += 2 * Simd::kWidth, group += Simd::kGroups) {
        const Rows rows = source.rows(group);
        find(rows.first);
        find(rows.second);
    }
    return found;
}

// Of a number from 0 to 2^22: 2^23 rounds it, and where that was upwards it is one less.
F floor(F positive) {
    const F nearest = Simd::sub(Simd::add(positive, Simd::set(0x1p23f)), Simd::set(0x1p23f));
    const auto above = Simd::less_signed(Simd::as_int(positive), Simd::as_int(nearest));
    const I below = Simd::as_int(Simd::sub(nearest, Simd::set(1.0f)));
    return Simd::as_float(Simd::select(above, below, Simd::as_int(nearest)));
}

// See round_by in storage.h.
template <Storage storage>
F round_by(I random, F value) {
    const I bits = Simd::as_int(value), magnitude = Simd::and_i(bits, Simd::set_i(0x7FFFFFFFu));
    const I power = Simd::and_i(bits, Simd::set_i(kInfinity));
    if constexpr (storage == Storage::fp16) {
        const I ulp = Simd::sub_i(Simd::max_signed(power, Simd::set_i(kFp16Smallest)),
                                  Simd::set_i(kFp16Spacing));
        const F inverse = Simd::as_float(Simd::sub_i(Simd::set_i(kTwiceOne), ulp));
        const F quotient = Simd::mul(Simd::as_float(magnitude), inverse), n = floor(quotient);
        const F chance = Simd::mul(Simd::sub(quotient, n), Simd::set(0x1p16f));
        const auto up =
            Simd::less_signed(Simd::as_int(Simd::to_float(random)), Simd::as_int(chance));
        const I one = Simd::select(up, Simd::as_int(Simd::set(1.0f)), Simd::set_i(0));
        const F rounded = Simd::mul(Simd::add(n, Simd::as_float(one)), Simd::as_float(ulp));
        const I sign = Simd::and_i(bits, Simd::set_i(0x80000000u));
        const auto ends = Simd::less_signed(magnitude, Simd::set_i(kFp16End));
        return Simd::as_float(Simd::select(ends, Simd::or_i(Simd::as_int(rounded), sign), bits));
    } else {
        constexpr int dropped = storage == Storage::bf16 ? 16 : 8;
        const I sum = Simd::add_i(bits, Simd::template shr<16 - dropped>(random));
        const I rounded = Simd::and_i(sum, Simd::set_i(~0u << dropped));
        const auto special = Simd::equal(power, Simd::set_i(kInfinity));
        return Simd::as_float(Simd::select(special, bits, rounded));
    }
}

template <Storage storage>
void round_values(const unsigned char* random, int64_t n, float* values) {
    for (int64_t j = 0; j < n; j += Simd::kWidth) {
        const I halves = Simd::load_u16(random + 2 * j);
        Simd::store(values + j, round_by<storage>(halves, Simd::load(values + j)));
    }
}

template <Storage storage>
void load_block(const SweepTensor& tensor, int64_t i, int64_t n, float* t) {
    constexpr int w = Simd::kWidth, pb = param_bytes(storage), rb = residual_bytes(storage);
    const unsigned char* param = static_cast<const unsigned char*>(tensor.param) + i * pb;
    const unsigned char* residual = static_cast<const unsigned char*>(tensor.residual) + i * rb;
    int64_t j = 0;
    for (; j + w <= n; j += w) {
        Simd::store(t + j, load_vector<storage>(param + j * pb, residual + j * rb));
    }
    if (j < n) {
        unsigned char params[w * pb] = {}, residuals[w * 2] = {};
        memcpy(params, param + j * pb, size_t(n - j) * pb);
        if (rb > 0) memcpy(residuals, residual + j * rb, size_t(n - j) * rb);
        Simd::store(t + j, load_vector<storage>(params, residuals));
    }
}

template <Storage storage>
void store_block(const SweepTensor& tensor, int64_t i, int64_t n, const float* t) {
    constexpr int w = Simd::kWidth, pb = param_bytes(storage), rb = residual_bytes(storage);
    unsigned char* param = static_cast<unsigned char*>(tensor.param) + i * pb;
    unsigned char* residual = static_cast<unsigned char*>(tensor.residual) + i * rb;
    int64_t j = 0;
    for (; j + w <= n; j += w) {
        store_vector<storage>(param + j * pb, residual + j * rb, Simd::load(t + j));
    }
    if (j < n) {
        unsigned char params[w * pb], residuals[w * 2];
        store_vector<storage>(params, residuals, Simd::load(t + j));
        memcpy(param + j * pb, params, size_t(n - j) * pb);
        if (rb > 0) memcpy(residual + j * rb, residuals, size_t(n - j) * rb);
    }
}

}  // namespace
}  // namespace zokern
