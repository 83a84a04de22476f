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

ZK_FN Words philox(Words c, uint32_t key0, uint32_t key1) {
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int round = 0; round < 10; ++round) {
        const uint64_t p0 = uint64_t(kPhiloxM0) * c.w[0];
        const uint64_t p1 = uint64_t(kPhiloxM1) * c.w[2];
        c = {{uint32_t(p1 >> 32) ^ c.w[1] ^ key0, uint32_t(p1),
              uint32_t(p0 >> 32) ^ c.w[3] ^ key1, uint32_t(p0)}};
        key0 += kPhiloxW0;
        key1 += kPhiloxW1;
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
    return philox({{group, s.c1, s.c2, s.draw}}, s.key0, s.key1);
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

// Sum of the four bytes of `bytes`, each times the matching byte of `weights`, all unsigned.
ZK_FN uint32_t dot_bytes(uint32_t bytes, uint32_t weights) {
#ifdef __CUDA_ARCH__
    return __dp4a(bytes, weights, 0u);
#else
    uint32_t sum = 0;
    for (int i = 0; i < 32; i += 8) sum += ((bytes >> i) & 255u) * ((weights >> i) & 255u);
    return sum;
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

ZK_FN float gauss_value(const Gauss& g, uint32_t bytes) {
    const float x = float(int32_t(dot_bytes(bytes, g.weights)) - g.centre) * g.scale;
    const float s = x * x;
    float q = fma32(g.c4, s, g.c3);
    q = fma32(q, s, g.c2);
    q = fma32(q, s, g.c1);
    q = fma32(q, s, g.c0);
    return q * x;
}

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

// √(-2 ln u), u = (word | 1) 2^-32.
ZK_FN float normal_radius(uint32_t word) {
    const uint32_t n = word | 1u;
    const int zeros = leading_zeros(n);
    const uint32_t m = n << zeros;
    const uint32_t low = m < kSqrtHalf ? 1u : 0u;
    // u = (1 + r) 2^-halvings: the shifted word, less 2^32, is r 2^32, exactly.
    const float r = float(int32_t(m << low)) * 0x1p-32f;
    const float halvings = float(zeros + int(low));
    float p = kLog1p[0];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 1; i < 9; ++i) p = fma32(p, r, kLog1p[i]);
    const float log1p = fma32(r * r, p, r);
    const float minus_log = fma32(halvings, kLn2, -log1p);
    return sqrt32(minus_log + minus_log);
}

struct CosSin {
    float cos, sin;
};

// cos and sin of 2π word 2^-32.
ZK_FN CosSin normal_angle(uint32_t word) {
    const uint32_t quarter = (word + 0x20000000u) >> 30;
    const float t = float(int32_t(word - (quarter << 30))) * 0x1p-29f;
    const float s = t * t;
    float sine = kSin[0], cosine = kCos[0];
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 1; i < 4; ++i) sine = fma32(sine, s, kSin[i]);
#ifdef __CUDACC__
#pragma unroll
#endif
    for (int i = 1; i < 5; ++i) cosine = fma32(cosine, s, kCos[i]);
    sine = fma32(t, kQuarterPi, t * sine);
    const bool swap = quarter & 1u;
    const float c = swap ? sine : cosine, d = swap ? cosine : sine;
    const uint32_t c_sign = ((quarter + 1u) & 2u) << 30, d_sign = (quarter & 2u) << 30;
    return {bits_float(float_bits(c) ^ c_sign), bits_float(float_bits(d) ^ d_sign)};
}

// Elements 4·half … 4·half + 3 of an octet come from these words (gauss32 and normal).
template <Law law>
ZK_FN void quartet(const Words& words, float* z) {
    if constexpr (law == Law::gauss32) {
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int j = 0; j < 4; ++j) z[j] = gauss_value(gauss32(), words.w[j]);
    } else {
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int j = 0; j < 4; j += 2) {
            const float radius = normal_radius(words.w[j]);
            const CosSin angle = normal_angle(words.w[j + 1]);
            z[j] = radius * angle.cos;
            z[j + 1] = radius * angle.sin;
        }
    }
}

// Elements 8·index … 8·index + 7 of a draw.
template <Law law>
ZK_FN void octet(const Stream& stream, uint64_t index, float* z) {
    static_assert(law != Law::uniform32 && law != Law::rounding16, "words, not directions");
    if constexpr (law == Law::gauss16) {
        const Words words = group_words(stream, uint32_t(index));
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int j = 0; j < 4; ++j) {
            z[2 * j] = gauss_value(gauss16(), words.w[j] & 0x0F0F0F0Fu);
            z[2 * j + 1] = gauss_value(gauss16(), (words.w[j] >> 4) & 0x0F0F0F0Fu);
        }
    } else if constexpr (law == Law::rademacher) {
        const Words words = group_words(stream, uint32_t(index >> 4));
        const uint32_t which = uint32_t(index >> 2) & 3u;
        // Selects, not an indexed array: a run-time index would move the words to local memory.
        const uint32_t low = which & 1u ? words.w[1] : words.w[0];
        const uint32_t high = which & 1u ? words.w[3] : words.w[2];
        const uint32_t bits = (which & 2u ? high : low) >> (8 * (uint32_t(index) & 3u));
#ifdef __CUDACC__
#pragma unroll
#endif
        for (int j = 0; j < 8; ++j) z[j] = bits_float(0x3F800000u | ((bits >> j) & 1u) << 31);
    } else {
        quartet<law>(group_words(stream, uint32_t(2 * index)), z);
        quartet<law>(group_words(stream, uint32_t(2 * index + 1)), z + 4);
    }
}

}  // namespace zokern
