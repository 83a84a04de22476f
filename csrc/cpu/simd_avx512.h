// AVX-512 (F, BW, DQ, VL, VNNI): sixteen floats, the words of eight groups.
#pragma once

#include <immintrin.h>

#include "../noise.h"

namespace zokern {
namespace {

struct Simd {
    using F = __m512;
    using I = __m512i;
    static constexpr int kWidth = 16;
    static constexpr int kGroups = 8;
    static constexpr const char* kName = "avx512";

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static I load_i(const void* p) { return _mm512_loadu_si512(p); }
    static void store_i(void* p, I x) { _mm512_storeu_si512(p, x); }
    // To a multiple of the vector's size, past the caches; `drain` ends such writes.
    static void stream_i(void* p, I x) { _mm512_stream_si512(static_cast<I*>(p), x); }
    static void drain() { _mm_sfence(); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static I set_i(uint32_t x) { return _mm512_set1_epi32(int(x)); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
    static F as_float(I a) { return _mm512_castsi512_ps(a); }
    static I as_int(F a) { return _mm512_castps_si512(a); }
    static I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
    static I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I and_i(I a, I b) { return _mm512_and_si512(a, b); }
    static I or_i(I a, I b) { return _mm512_or_si512(a, b); }
    static I xor_i(I a, I b) { return _mm512_xor_si512(a, b); }
    template <int n>
    static I shl(I a) {
        return _mm512_slli_epi32(a, n);
    }
    template <int n>
    static I shr(I a) {
        return _mm512_srli_epi32(a, n);
    }
    template <int n>
    static I sar(I a) {
        return _mm512_srai_epi32(a, n);
    }
    static I shl_each(I a, I n) { return _mm512_sllv_epi32(a, n); }
    static I leading_zeros(I a) { return _mm512_lzcnt_epi32(a); }

    using Mask = __mmask16;
    static Mask less_unsigned(I a, I b) { return _mm512_cmplt_epu32_mask(a, b); }
    static Mask equal(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static bool any(Mask m) { return m != 0; }
    static Mask is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static Mask nonzero(I a) { return _mm512_test_epi32_mask(a, a); }
    static I select(Mask m, I yes, I no) { return _mm512_mask_blend_epi32(m, no, yes); }

    static Mask less_signed(I a, I b) { return _mm512_cmplt_epi32_mask(a, b); }
    static int count(Mask m) { return __builtin_popcount(m); }
    static I max_signed(I a, I b) { return _mm512_max_epi32(a, b); }
    static I shr_all(I a, int n) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(n)); }

    // The lanes of the mask side by side at p, where there is room for all; how many they are.
    static int compress(uint32_t* p, Mask m, I x) {
        store_i(p, _mm512_maskz_compress_epi32(m, x));
        return count(m);
    }

    // Sixteen bits of `bits` as lanes of sign bits.
    static I sign_bits(const unsigned char* bits) {
        uint16_t m;
        memcpy(&m, bits, 2);
        return _mm512_maskz_set1_epi32(m, int(0x80000000u));
    }

    // Σ of four products of unsigned bytes with signed bytes, in each lane, plus acc.
    static I dot(I acc, I unsigned_bytes, I signed_bytes) {
        return _mm512_dpbusd_epi32(acc, unsigned_bytes, signed_bytes);
    }

    static I load_u8(const void* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    }
    static I load_u16(const void* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    }
    static void store_u8(void* p, I x) {
        _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
    }
    static void store_u16(void* p, I x) {
        _mm256_storeu_si256(static_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
    }
    static F load_fp16(const void* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    }
    static void store_fp16(void* p, F x) {
        _mm256_storeu_si256(static_cast<__m256i*>(p),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F round_to_fp16(F x) {
        return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }

    // Philox works on one counter per 64-bit lane; the high half of a lane may hold anything.
    static I mul_wide(I a, I b) { return _mm512_mul_epu32(a, b); }
    static I high_half(I a) { return _mm512_srli_epi64(a, 32); }
    static I xor3(I a, I b, I c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

    // Counter lanes hold groups in this order, so that `rows` comes out in memory order.
    static I group_order() { return _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7); }

    // Words 0 … 3 of eight groups, one group per 64-bit lane → groups 0 … 3 and groups 4 … 7, each
    // with its words side by side.
    static void rows(I w0, I w1, I w2, I w3, I& first, I& second) {
        const I w01 = _mm512_mask_blend_epi32(0xAAAA, w0, _mm512_slli_epi64(w1, 32));
        const I w23 = _mm512_mask_blend_epi32(0xAAAA, w2, _mm512_slli_epi64(w3, 32));
        first = _mm512_unpacklo_epi64(w01, w23);
        second = _mm512_unpackhi_epi64(w01, w23);
    }

    // a0 b0 a1 b1 … of two vectors, within the vectors as a whole.
    static void interleave(F a, F b, F& first, F& second) {
        const __m512d low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
        const __m512d high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
        first = _mm512_castpd_ps(
            _mm512_permutex2var_pd(low, _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high));
        second = _mm512_castpd_ps(
            _mm512_permutex2var_pd(low, _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15), high));
    }

    // In each lane the halves of a's lane and, above it, of b's.
    static I upper_halves(I a, I b) {
        return _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b);
    }
    static I lower_halves(I a, I b) {
        return _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
    }
    // Each half, and 1 more where what was cut off behind it says so: to nearest, ties to even.
    static I round_halves(I halves, I rest) {
        const I one = _mm512_set1_epi16(1);
        const I rest_or_odd = _mm512_ternarylogic_epi32(rest, halves, one, 0xF8);
        const __mmask32 up = _mm512_cmpgt_epu16_mask(rest_or_odd, _mm512_set1_epi16(-0x8000));
        return _mm512_mask_add_epi16(halves, up, halves, one);
    }

    // Even and odd lanes of (a, b), within each 128 bits: a0 a2 b0 b2 and a1 a3 b1 b3.
    static I even(I a, I b) {
        return as_int(_mm512_shuffle_ps(as_float(a), as_float(b), _MM_SHUFFLE(2, 0, 2, 0)));
    }
    static I odd(I a, I b) {
        return as_int(_mm512_shuffle_ps(as_float(a), as_float(b), _MM_SHUFFLE(3, 1, 3, 1)));
    }
    static F zip_low(F a, F b) { return _mm512_unpacklo_ps(a, b); }
    static F zip_high(F a, F b) { return _mm512_unpackhi_ps(a, b); }
};

}  // namespace
}  // namespace zokern
