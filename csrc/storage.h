// How a float32 value is kept: in a parameter alone, or in a parameter and a residual.
//
//   bfloat16 + int16  split    bits = (parameter << 16) + residual, modulo 2^32
//   bfloat16 + int8   split8   bits = (parameter << 16) + 256 residual
//   float16 + float16 split    value = parameter + residual 2^-11
#pragma once

#include "noise.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

namespace zokern {

enum class Storage : int {
    fp32 = 0,
    bf16 = 1,
    fp16 = 2,
    bf16_split16 = 3,
    bf16_split8 = 4,
    fp16_split = 5,
};

ZK_FN constexpr int param_bytes(Storage s) { return s == Storage::fp32 ? 4 : 2; }

ZK_FN constexpr int residual_bytes(Storage s) {
    return s == Storage::bf16_split8                                ? 1
           : s == Storage::bf16_split16 || s == Storage::fp16_split ? 2
                                                                    : 0;
}

// Of the parameter alone, without the residual.
ZK_FN constexpr Storage alone(Storage s) {
    return s == Storage::fp32                               ? Storage::fp32
           : s == Storage::fp16 || s == Storage::fp16_split ? Storage::fp16
                                                            : Storage::bf16;
}

// Whether values can be rounded to it stochastically.
ZK_FN constexpr bool rounds(Storage s) {
    return s == Storage::bf16 || s == Storage::fp16 || s == Storage::bf16_split8;
}

// A parameter's and a residual's bits, in the low end of each word.
struct Stored {
    uint32_t param, residual;
};

ZK_FN bool is_nan(uint32_t bits) { return (bits & 0x7FFFFFFFu) > 0x7F800000u; }

ZK_FN uint32_t to_bf16(float value) {
    const uint32_t bits = float_bits(value);
    if (is_nan(bits)) return (bits >> 16) | 0x40u;
    return (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
}

ZK_FN float from_bf16(uint32_t param) { return bits_float(param << 16); }

ZK_FN uint32_t to_fp16(float value) {
#ifdef __CUDA_ARCH__
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;
    if (magnitude < 0x38800000u) {
        // Adding 2^-1 aligns the value's last bit with that of a float16 denormal, 2^-24, and
        // rounds it to nearest even.
        return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u);
    }
    const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    return sign | ((rounded - 0x38000000u) >> 13);
#endif
}

ZK_FN float from_fp16(uint32_t half) {
#ifdef __CUDA_ARCH__
    return __half2float(__ushort_as_half(uint16_t(half)));
#else
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return bits_float(sign | 0x7F800000u | (magnitude & 0x3FFu) << 13);
    // The exponent is rebiased by a product, which normalises denormals too.
    return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
#endif
}

template <Storage storage>
ZK_FN float load_value(Stored s) {
    if constexpr (storage == Storage::fp32) {
        return bits_float(s.param);
    } else if constexpr (storage == Storage::bf16) {
        return from_bf16(s.param);
    } else if constexpr (storage == Storage::fp16) {
        return from_fp16(s.param);
    } else if constexpr (storage == Storage::bf16_split16) {
        return bits_float((s.param << 16) + uint32_t(int32_t(int16_t(s.residual))));
    } else if constexpr (storage == Storage::bf16_split8) {
        return bits_float((s.param << 16) + (uint32_t(int32_t(int8_t(s.residual))) << 8));
    } else {
        return fma32(from_fp16(s.residual), 0x1p-11f, from_fp16(s.param));
    }
}

constexpr uint32_t kInfinity = 0x7F800000u;
constexpr uint32_t kFp16End = 0x47800000u;       // 2^16: float16 has nothing there
constexpr uint32_t kFp16Smallest = 0x38800000u;  // 2^-14: below it the spacing stays the same
constexpr uint32_t kFp16Spacing = 10u << 23;     // less this, a power of two is the spacing there
constexpr uint32_t kTwiceOne = 254u << 23;  // less the bits of a power of two: those of its inverse

// The value rounded up or down by 16 random bits to one that the storage keeps as it is; infinities
// and NaN stay as they are.
template <Storage storage>
ZK_FN float round_by(uint32_t random, float value) {
    const uint32_t bits = float_bits(value), magnitude = bits & 0x7FFFFFFFu;
    if constexpr (storage == Storage::fp16) {
        if (magnitude >= kFp16End) return value;
        const uint32_t power = magnitude & kInfinity;
        const uint32_t ulp = (power > kFp16Smallest ? power : kFp16Smallest) - kFp16Spacing;
        const float quotient = bits_float(magnitude) * bits_float(kTwiceOne - ulp);
        const float n = float(uint32_t(quotient));
        const float up = float(random) < (quotient - n) * 0x1p16f ? 1.0f : 0.0f;
        return bits_float(float_bits((n + up) * bits_float(ulp)) | (bits & 0x80000000u));
    } else {
        constexpr int dropped = storage == Storage::bf16 ? 16 : 8;
        if (magnitude >= kInfinity) return value;
        return bits_float((bits + (random >> (16 - dropped))) >> dropped << dropped);
    }
}

template <Storage storage>
ZK_FN Stored store_value(float value) {
    const uint32_t bits = float_bits(value);
    if constexpr (storage == Storage::fp32) {
        return {bits, 0};
    } else if constexpr (storage == Storage::bf16) {
        return {to_bf16(value), 0};
    } else if constexpr (storage == Storage::fp16) {
        return {to_fp16(value), 0};
    } else if constexpr (storage == Storage::fp16_split) {
        const uint32_t param = to_fp16(value);
        const bool finite = (param & 0x7C00u) != 0x7C00u;
        return {param, finite ? to_fp16((value - from_fp16(param)) * 0x1p11f) : 0u};
    } else {
        // Ties away from zero: only so does the difference always fit the residual.
        // A NaN is cut to the parameter's bits first, so that no carry turns it into a number.
        const uint32_t clean = is_nan(bits) ? (bits & 0xFFFF0000u) | 0x400000u : bits;
        const bool narrow = storage == Storage::bf16_split8;
        const uint32_t kept = narrow ? clean + 0x80u : clean;
        const uint32_t param = (kept + 0x8000u) >> 16;
        return {param, narrow ? (kept >> 8) & 0xFFu : kept & 0xFFFFu};
    }
}

}  // namespace zokern
