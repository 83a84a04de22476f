// AVX2, FMA, F16C: eight floats, the words of four groups.
#pragma once

#include <immintrin.h>

#include "../noise.h"

namespace zokern {
namespace {

struct Simd {
    using F = __m256;
    using I = __m256i;
    static constexpr int kWidth = 8;
    static constexpr int kGroups = 4;
    static constexpr const char* kName = "avx2";

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
    static I load_i(const void* p) { return _mm256_loadu_si256(static_cast<const I*>(p)); }
    static void store_i(void* p, I x) { _mm256_storeu_si256(static_cast<I*>(p), x); }
    // To a multiple of the vector's size, past the caches; `drain` ends such writes.
    static void stream_i(void* p, I x) { _mm256_stream_si256(static_cast<I*>(p), x); }
    static void drain() { _mm_sfence(); }
    static F set(float x) { return _mm256_set1_ps(x); }
    static I set_i(uint32_t x) { return _mm256_set1_epi32(int(x)); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static F to_float(I a) { return _mm256_cvtepi32_ps(a); }
    static F as_float(I a) { return _mm256_castsi256_ps(a); }
    static I as_int(F a) { return _mm256_castps_si256(a); }
    static I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
    static I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I and_i(I a, I b) { return _mm256_and_si256(a, b); }
    static I or_i(I a, I b) { return _mm256_or_si256(a, b); }
    static I xor_i(I a, I b) { return _mm256_xor_si256(a, b); }
    template <int n>
    static I shl(I a) {
        return _mm256_slli_epi32(a, n);
    }
    template <int n>
    static I shr(I a) {
        return _mm256_srli_epi32(a, n);
    }
    template <int n>
    static I sar(I a) {
        return _mm256_srai_epi32(a, n);
    }
    static I shl_each(I a, I n) { return _mm256_sllv_epi32(a, n); }

    // The exponent of the value as a float; cutting the bits that rounding could carry out of
    // keeps it the place of the highest set bit.
    static I leading_zeros(I a) {
        const I cut = _mm256_andnot_si256(_mm256_srli_epi32(a, 1), a);
        const I negative = _mm256_srai_epi32(cut, 31);
        const I exponent = _mm256_srli_epi32(as_int(to_float(cut)), 23);
        return _mm256_andnot_si256(negative, _mm256_sub_epi32(set_i(158), exponent));
    }

    using Mask = I;
    static Mask less_unsigned(I a, I b) {
        const I sign = set_i(0x80000000u);
        return _mm256_cmpgt_epi32(xor_i(b, sign), xor_i(a, sign));
    }
    static Mask equal(I a, I b) { return _mm256_cmpeq_epi32(a, b); }
    static bool any(Mask m) { return _mm256_testz_si256(m, m) == 0; }
    static Mask is_nan(F a) { return as_int(_mm256_cmp_ps(a, a, _CMP_UNORD_Q)); }
    static Mask nonzero(I a) {
        return xor_i(_mm256_cmpeq_epi32(a, _mm256_setzero_si256()), set_i(0xFFFFFFFFu));
    }
    static I select(Mask m, I yes, I no) { return _mm256_blendv_epi8(no, yes, m); }

    static Mask less_signed(I a, I b) { return _mm256_cmpgt_epi32(b, a); }
    static uint32_t bits(Mask m) { return uint32_t(_mm256_movemask_ps(as_float(m))); }
    static int count(Mask m) { return __builtin_popcount(bits(m)); }
    static I max_signed(I a, I b) { return _mm256_max_epi32(a, b); }
    static I shr_all(I a, int n) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(n)); }

    // The lanes of the mask side by side at p, where there is room for all; how many they are.
    static int compress(uint32_t* p, Mask m, I x) {
        uint32_t set = bits(m);
        if (set == 0xFFu) {
            store_i(p, x);
            return kWidth;
        }
        uint32_t lanes[kWidth];
        if (set != 0) store_i(lanes, x);
        int n = 0;
        for (; set != 0; set &= set - 1) p[n++] = lanes[__builtin_ctz(set)];
        return n;
    }

    // Eight bits of `bits` as lanes of sign bits.
    static I sign_bits(const unsigned char* bits) {
        const I shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
        return and_i(_mm256_sllv_epi32(set_i(*bits), shifts), set_i(0x80000000u));
    }

    // Σ of four products of unsigned bytes with signed bytes, in each lane, plus acc. The sums of
    // two products stay within 16 bits for the weights of both Gaussian laws.
    static I dot(I acc, I unsigned_bytes, I signed_bytes) {
        const I pairs = _mm256_maddubs_epi16(unsigned_bytes, signed_bytes);
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }

    static I load_u8(const void* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
    }
    static I load_u16(const void* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static __m128i low_halves(I x) {
        const I narrow = _mm256_packus_epi32(and_i(x, set_i(0xFFFFu)), _mm256_setzero_si256());
        return _mm256_castsi256_si128(_mm256_permute4x64_epi64(narrow, 0x08));
    }
    static void store_u8(void* p, I x) {
        const __m128i halves = low_halves(and_i(x, set_i(0xFFu)));
        _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(halves, halves));
    }
    static void store_u16(void* p, I x) {
        _mm_storeu_si128(static_cast<__m128i*>(p), low_halves(x));
    }
    static F load_fp16(const void* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static void store_fp16(void* p, F x) {
        _mm_storeu_si128(static_cast<__m128i*>(p),
                         _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F round_to_fp16(F x) {
        return _mm256_cvtph_ps(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // Philox works on one counter per 64-bit lane; the high half of a lane may hold anything.
    static I mul_wide(I a, I b) { return _mm256_mul_epu32(a, b); }
    static I high_half(I a) { return _mm256_srli_epi64(a, 32); }
    static I xor3(I a, I b, I c) { return xor_i(xor_i(a, b), c); }

    // Counter lanes hold groups in this order, so that `rows` comes out in memory order.
    static I group_order() { return _mm256_setr_epi64x(0, 2, 1, 3); }

    // Words 0 … 3 of four groups, one group per 64-bit lane → groups 0, 1 and groups 2, 3, each
    // with its words side by side.
    static void rows(I w0, I w1, I w2, I w3, I& first, I& second) {
        const I w01 = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xAA);
        const I w23 = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xAA);
        first = _mm256_unpacklo_epi64(w01, w23);
        second = _mm256_unpackhi_epi64(w01, w23);
    }

    // a0 b0 a1 b1 … of two vectors, within the vectors as a whole.
    static void interleave(F a, F b, F& first, F& second) {
        const F low = _mm256_unpacklo_ps(a, b), high = _mm256_unpackhi_ps(a, b);
        first = _mm256_permute2f128_ps(low, high, 0x20);
        second = _mm256_permute2f128_ps(low, high, 0x31);
    }

    // In each lane the halves of a's lane and, above it, of b's.
    static I upper_halves(I a, I b) {
        return _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA);
    }
    static I lower_halves(I a, I b) {
        return _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA);
    }
    // Each half, and 1 more where what was cut off behind it says so: to nearest, ties to even.
    static I round_halves(I halves, I rest) {
        const I odd = _mm256_and_si256(halves, _mm256_set1_epi16(1));
        const I above_half =
            _mm256_avg_epu16(_mm256_or_si256(rest, odd), _mm256_set1_epi16(0x7FFE));
        return _mm256_add_epi16(halves, _mm256_srli_epi16(above_half, 15));
    }

    // Even and odd lanes of (a, b), within each 128 bits: a0 a2 b0 b2 and a1 a3 b1 b3.
    static I even(I a, I b) {
        return as_int(_mm256_shuffle_ps(as_float(a), as_float(b), _MM_SHUFFLE(2, 0, 2, 0)));
    }
    static I odd(I a, I b) {
        return as_int(_mm256_shuffle_ps(as_float(a), as_float(b), _MM_SHUFFLE(3, 1, 3, 1)));
    }
    static F zip_low(F a, F b) { return _mm256_unpacklo_ps(a, b); }
    static F zip_high(F a, F b) { return _mm256_unpackhi_ps(a, b); }
};

}  // namespace
}  // namespace zokern
