// The noise contract: Philox4x32-10 and the laws that turn its words into numbers.
//
// Host and device code include this file, so the CPU tests exercise the very arithmetic of the
// CUDA kernels. Every function has internal linkage: a translation unit compiled for AVX-512 must
// not lend its copy to one that runs on an older CPU.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef __CUDACC__
#include <cmath>
#endif

#ifdef __CUDACC__
#define ZK_FN static __host__ __device__ __forceinline__
#else
#define ZK_FN static inline
#endif

#ifdef __CUDA_ARCH__
#define ZK_UNROLL _Pragma("unroll")
#else
#define ZK_UNROLL
#endif

namespace zokern {

enum class Law : int {
    gauss16 = 0,
    gauss32 = 1,
    rademacher = 2,
    uniform32 = 3,
    rounding16 = 4,
    normal = 5,
};

ZK_FN constexpr int elements_per_group(Law law) {
    switch (law) {
        case Law::gauss16:
        case Law::rounding16:
            return 8;
        case Law::rademacher:
            return 128;
        default:
            return 4;
    }
}

struct Words {
    uint32_t w[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// The keys of the ten rounds, the two of a round side by side.
struct KeySchedule {
    uint32_t keys[20];
};

ZK_FN KeySchedule key_schedule(uint32_t key0, uint32_t key1) {
    KeySchedule schedule;
    ZK_UNROLL
    for (uint32_t round = 0; round < 10; ++round) {
        schedule.keys[2 * round] = key0 + round * kPhiloxW0;
        schedule.keys[2 * round + 1] = key1 + round * kPhiloxW1;
    }
    return schedule;
}

ZK_FN Words philox(Words c, const KeySchedule& schedule) {
    ZK_UNROLL
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(kPhiloxM0) * c.w[0];
        const uint64_t p1 = uint64_t(kPhiloxM1) * c.w[2];
        c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ schedule.keys[2 * round], uint32_t(p1),
              uint32_t(p0 >> 32) ^ c.w[3] ^ schedule.keys[2 * round + 1], uint32_t(p0)}};
    }
    return c;
}

// The part of a draw's counter and key that all groups of one tensor share.
struct Stream {
    uint32_t key0, key1, c1, c2, draw;
};

ZK_FN Stream make_stream(uint64_t seed, uint64_t tensor_id, uint32_t draw, Law law) {
    return {uint32_t(seed), uint32_t(seed >> 32), uint32_t(tensor_id >> 24),
            uint32_t(tensor_id & 0xFFFFFFu) | (uint32_t(law) << 24), draw};
}

ZK_FN Words group_words(const Stream& s, uint32_t group) {
    return philox({{group, s.c1, s.c2, s.draw}}, key_schedule(s.key0, s.key1));
}

ZK_FN float fma32(float a, float b, float c) {
#ifdef __CUDA_ARCH__
    return __fmaf_rn(a, b, c);
#else
    return __builtin_fmaf(a, b, c);
#endif
}

ZK_FN float sqrt32(float a) {
#ifdef __CUDA_ARCH__
    return __fsqrt_rn(a);
#else
    return __builtin_sqrtf(a);
#endif
}

// √a for 2^-101 ≤ a: the instructions that __fsqrt_rn becomes on every NVIDIA GPU, less the test
// for smaller arguments, and like it correctly rounded.
ZK_FN float sqrt_in_range(float a) {
#ifdef __CUDA_ARCH__
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(a));
    const float root = a * inverse;
    return fma32(fma32(-root, root, a), 0.5f * inverse, root);
#else
    return sqrt32(a);
#endif
}

ZK_FN int leading_zeros(uint32_t nonzero) {
#ifdef __CUDA_ARCH__
    return __clz(int(nonzero));
#else
    return __builtin_clz(nonzero);
#endif
}

ZK_FN uint32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
    return __float_as_uint(x);
#else
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
#endif
}

ZK_FN float bits_float(uint32_t u) {
#ifdef __CUDA_ARCH__
    return __uint_as_float(u);
#else
    float x;
    memcpy(&x, &u, 4);
    return x;
#endif
}

// `sum` plus the four bytes of `bytes`, each times the matching byte of `weights`, all unsigned.
ZK_FN uint32_t dot_bytes(uint32_t bytes, uint32_t weights, uint32_t sum) {
#ifdef __CUDA_ARCH__
    return __dp4a(bytes, weights, sum);
#else
    for (int i = 0; i < 32; i += 8) sum += ((bytes >> i) & 255u) * ((weights >> i) & 255u);
    return sum;
#endif
}

// `sum` plus the low half of `halves` times the lowest byte of `weights` and the high half times
// the next byte, all unsigned.
ZK_FN uint32_t dot_halves(uint32_t halves, uint32_t weights, uint32_t sum) {
#ifdef __CUDA_ARCH__
    return __dp2a_lo(halves, weights, sum);
#else
    return sum + (halves & 0xFFFFu) * (weights & 255u) + (halves >> 16) * (weights >> 8 & 255u);
#endif
}

// The moment-matched Gaussians: z = x q(x²), x = (S - centre) 2^-shift.
struct Gauss {
    uint32_t weights;  // of the four nibbles (bytes), the least significant first
    int32_t centre;
    float scale;
    float c0, c1, c2, c3, c4;
};

ZK_FN constexpr Gauss gauss16() {
    return {181u | 211u << 8 | 233u << 16 | 251u << 24,
            6570,
            0x1p-13f,
            0x1.eec002p+1f,
            0x1.49af68p-1f,
            0x1.226b62p+1f,
            -0x1.eaff4cp+2f,
            0x1.9e1758p+3f};
}

ZK_FN constexpr Gauss gauss32() {
    return {55u | 73u << 8 | 57u << 16 | 71u << 24,
            32640,
            0x1p-15f,
            0x1.a620b6p+1f,
            0x1.8c8928p-2f,
            0x1.0c873ap+0f,
            -0x1.2e61b8p+1f,
            0x1.66ffaep+1f};
}

// The bytes may be those of the law times `unit`, a power of two of at most 16.
ZK_FN float gauss_value(const Gauss& g, uint32_t bytes, float unit) {
    // These are the bits of 2^23 + S unit as a float: no integer is converted, which GPUs do
    // slowly. Everything is exact here.
    const float biased = bits_float(dot_bytes(bytes, g.weights, 0x4B000000u));
    const float scale = g.scale / unit;
    const float x = fma32(biased, scale, -(0x1p23f + float(g.centre) * unit) * scale);
    const float s = x * x;
    float q = fma32(g.c4, s, g.c3);
    q = fma32(q, s, g.c2);
    q = fma32(q, s, g.c1);
    q = fma32(q, s, g.c0);
    return q * x;
}

// +1 where the lowest bit is 0, -1 where it is 1.
ZK_FN float sign_value(uint32_t bit) { return bits_float(0x3F800000u | (bit & 1u) << 31); }

// Coefficients of the `normal` law. log1p(r) = r + r² P(r) on [√½ - 1, √2 - 1];
// sin(πt/4) = t (kQuarterPi + S(t²)) and cos(πt/4) = C(t²) on [-1, 1]; highest power first.
constexpr float kLog1p[9] = {-0x1.383d96p-4f, 0x1.084e02p-3f,  -0x1.0f375cp-3f,
                             0x1.22709cp-3f,  -0x1.54274ap-3f, 0x1.99a402p-3f,
                             -0x1.000428p-2f, 0x1.55555p-2f,   -0x1.fffff8p-2f};
constexpr float kQuarterPi = 0x1.921fb6p-1f;
constexpr float kSin[4] = {-0x1.2d9302p-15f, 0x1.465e92p-9f, -0x1.4abbbap-4f, -0x1.777a5cp-26f};
constexpr float kCos[5] = {0x1.d99f54p-19f, -0x1.55c4eap-12f, 0x1.03c1dap-6f, -0x1.3bd3ccp-2f,
                           1.0f};
constexpr float kLn2 = 0x1.62e43p-1f;
constexpr uint32_t kSqrtHalf = 0xB504F334u;  // ⌈√½ · 2^32⌉

// Device code can read the arrays above while it is compiled, not while it runs.
template <int n>
struct Series {
    float c[n];
};

template <int n>
ZK_FN constexpr Series<n> series(const float (&coefficients)[n]) {
    Series<n> result{};
    for (int i = 0; i < n; ++i) result.c[i] = coefficients[i];
    return result;
}

template <int n>
ZK_FN float horner(const Series<n>& s, float x) {
    float total = s.c[0];
    ZK_UNROLL
    for (int i = 1; i < n; ++i) total = fma32(total, x, s.c[i]);
    return total;
}

// √(-2 ln u), u = (word | 1) 2^-32.
ZK_FN float normal_radius(uint32_t word) {
    const uint32_t n = word | 1u;
    const int zeros = leading_zeros(n);
    const uint32_t m = n << zeros;
    const uint32_t low = m < kSqrtHalf ? 1u : 0u;
    // u = (1 + r) 2^-halvings: the shifted word, less 2^32, is r 2^32, exactly.
    const float r = float(int32_t(m << low)) * 0x1p-32f;
    const float halvings = float(zeros + int(low));
    constexpr Series<9> polynomial = series(kLog1p);
    const float log1p = fma32(r * r, horner(polynomial, r), r);
    const float minus_log = fma32(halvings, kLn2, -log1p);
    return sqrt_in_range(minus_log + minus_log);
}

struct CosSin {
    float cos, sin;
};

// cos and sin of 2π word 2^-32.
ZK_FN CosSin normal_angle(uint32_t word) {
    const uint32_t quarter = (word + 0x20000000u) >> 30;
    const float t = float(int32_t(word - (quarter << 30))) * 0x1p-29f;
    const float s = t * t;
    constexpr Series<4> sine_series = series(kSin);
    constexpr Series<5> cosine_series = series(kCos);
    const float sine = fma32(t, kQuarterPi, t * horner(sine_series, s));
    const float cosine = horner(cosine_series, s);
    const bool swap = quarter & 1u;
    const float c = swap ? sine : cosine, d = swap ? cosine : sine;
    const uint32_t c_sign = ((quarter + 1u) & 2u) << 30, d_sign = (quarter & 2u) << 30;
    return {bits_float(float_bits(c) ^ c_sign), bits_float(float_bits(d) ^ d_sign)};
}

// The values of one group's words, in the order of its elements.
template <Law law>
ZK_FN void group_values(const Words& words, float* z) {
    static_assert(law != Law::uniform32 && law != Law::rounding16, "words, not directions");
    if constexpr (law == Law::gauss16) {
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) {
            z[2 * j] = gauss_value(gauss16(), words.w[j] & 0x0F0F0F0Fu, 1.0f);
            z[2 * j + 1] = gauss_value(gauss16(), words.w[j] & 0xF0F0F0F0u, 16.0f);
        }
    } else if constexpr (law == Law::gauss32) {
        ZK_UNROLL
        for (int j = 0; j < 4; ++j) z[j] = gauss_value(gauss32(), words.w[j], 1.0f);
    } else if constexpr (law == Law::normal) {
        ZK_UNROLL
        for (int j = 0; j < 4; j += 2) {
            const float radius = normal_radius(words.w[j]);
            const CosSin angle = normal_angle(words.w[j + 1]);
            z[j] = radius * angle.cos;
            z[j + 1] = radius * angle.sin;
        }
    } else {
        for (int j = 0; j < 128; ++j) z[j] = sign_value(words.w[j / 32] >> (j % 32));
    }
}

// Elements 8·index … 8·index + 7 of a draw. A stream is whatever group_words takes.
template <Law law, class AnyStream>
ZK_FN void octet(const AnyStream& stream, uint64_t index, float* z) {
    if constexpr (law == Law::gauss16) {
        group_values<law>(group_words(stream, uint32_t(index)), z);
    } else if constexpr (law == Law::rademacher) {
        const Words words = group_words(stream, uint32_t(index >> 4));
        const uint32_t which = uint32_t(index >> 2) & 3u;
        // Selects, not an indexed array: a run-time index would move the words to local memory.
        const uint32_t low = which & 1u ? words.w[1] : words.w[0];
        const uint32_t high = which & 1u ? words.w[3] : words.w[2];
        const uint32_t bits = (which & 2u ? high : low) >> (8 * (uint32_t(index) & 3u));
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) z[j] = sign_value(bits >> j);
    } else {
        group_values<law>(group_words(stream, uint32_t(2 * index)), z);
        group_values<law>(group_words(stream, uint32_t(2 * index + 1)), z + 4);
    }
}

}  // namespace zokern
