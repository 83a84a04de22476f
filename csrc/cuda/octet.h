// Eight elements of a tensor: read, decoded, encoded and written.
#pragma once

#include <stdexcept>

#include "../storage.h"

namespace zokern {

// `bytes` per element. The elements lie in the words as in memory.
template <int bytes>
struct Octet {
    uint32_t words[2 * bytes];
};

template <>
struct Octet<0> {};

template <int bytes>
struct alignas(bytes == 1 ? 8 : 16) Vector {
    uint32_t words[bytes == 1 ? 2 : 4];
};

// A GPU faults where a vector is not on its boundary, so a simulated grid must not pass over it.
template <int bytes>
ZK_FN void check_boundary([[maybe_unused]] const char* at) {
#ifndef __CUDA_ARCH__
    if (reinterpret_cast<uintptr_t>(at) % sizeof(Vector<bytes>) != 0)
        throw std::logic_error("a vector off its boundary");
#endif
}

// From an address that is a multiple of the vector's size.
template <int bytes>
ZK_FN Octet<bytes> load_vectors(const char* at) {
    check_boundary<bytes>(at);
    Octet<bytes> octet;
    constexpr int size = sizeof(Vector<bytes>) / 4;
    ZK_UNROLL
    for (int i = 0; i < 2 * bytes; i += size) {
        const Vector<bytes> vector = reinterpret_cast<const Vector<bytes>*>(at)[i / size];
        ZK_UNROLL
        for (int j = 0; j < size; ++j) octet.words[i + j] = vector.words[j];
    }
    return octet;
}

template <int bytes>
ZK_FN void store_vectors(char* at, const Octet<bytes>& octet) {
    check_boundary<bytes>(at);
    constexpr int size = sizeof(Vector<bytes>) / 4;
    ZK_UNROLL
    for (int i = 0; i < 2 * bytes; i += size) {
        Vector<bytes> vector;
        ZK_UNROLL
        for (int j = 0; j < size; ++j) vector.words[j] = octet.words[i + j];
        reinterpret_cast<Vector<bytes>*>(at)[i / size] = vector;
    }
}

template <int bytes>
struct Word;
template <>
struct Word<1> {
    using Type = uint8_t;
};
template <>
struct Word<2> {
    using Type = uint16_t;
};
template <>
struct Word<4> {
    using Type = uint32_t;
};

// The elements of an octet that exist: bit j of `mask` for element j, others are zero. `at` is
// where element 0 lies, or would lie.
template <int bytes>
ZK_FN Octet<bytes> load_some(const char* at, uint32_t mask) {
    Octet<bytes> octet{};
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        if (mask >> j & 1u) {
            const uint32_t element = reinterpret_cast<const typename Word<bytes>::Type*>(at)[j];
            octet.words[j * bytes / 4] |= element << (8 * (j * bytes % 4));
        }
    }
    return octet;
}

template <int bytes>
ZK_FN void store_some(char* at, const Octet<bytes>& octet, uint32_t mask) {
    using Element = typename Word<bytes>::Type;
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        if (mask >> j & 1u)
            reinterpret_cast<Element*>(at)[j] =
                Element(octet.words[j * bytes / 4] >> (8 * (j * bytes % 4)));
    }
}

template <int bytes>
ZK_FN uint32_t element(const Octet<bytes>& octet, int j) {
    if constexpr (bytes == 0) {
        return 0;
    } else {
        const uint32_t word = octet.words[j * bytes / 4] >> (8 * (j * bytes % 4));
        return bytes == 4 ? word : word & ((1u << (8 * bytes % 32)) - 1u);
    }
}

// An octet of a parameter and of its residual.
template <Storage storage>
struct StoredOctet {
    Octet<param_bytes(storage)> param;
    Octet<residual_bytes(storage)> residual;
};

template <Storage storage>
ZK_FN void decode(const StoredOctet<storage>& stored, float* values) {
    ZK_UNROLL
    for (int j = 0; j < 8; ++j)
        values[j] = load_value<storage>({element(stored.param, j), element(stored.residual, j)});
}

// Two parameters in a word, the first in its low half, where there is no residual.
template <Storage storage>
ZK_FN uint32_t encode_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    uint32_t pair;
    if constexpr (storage == Storage::bf16)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return store_value<storage>(low).param | store_value<storage>(high).param << 16;
#endif
}

template <Storage storage>
ZK_FN StoredOctet<storage> encode(const float* values) {
    constexpr int pbytes = param_bytes(storage), rbytes = residual_bytes(storage);
    StoredOctet<storage> result{};
    if constexpr (storage == Storage::bf16 || storage == Storage::fp16) {
        ZK_UNROLL
        for (int j = 0; j < 8; j += 2)
            result.param.words[j / 2] = encode_pair<storage>(values[j], values[j + 1]);
    } else {
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) {
            const Stored stored = store_value<storage>(values[j]);
            result.param.words[j * pbytes / 4] |= stored.param << (8 * (j * pbytes % 4));
            if constexpr (rbytes > 0)
                result.residual.words[j * rbytes / 4] |= stored.residual << (8 * (j * rbytes % 4));
        }
    }
    return result;
}

ZK_FN bool all_finite(const float* values) {
    bool finite = true;
    ZK_UNROLL
    for (int j = 0; j < 8; ++j)
        finite = finite && bits_float(float_bits(values[j]) & 0x7FFFFFFFu) < bits_float(kInfinity);
    return finite;
}

// Bytes 0 to 3 of the first word are 0 to 3, those of the second 4 to 7; the lowest digit of
// `choice` chooses the lowest byte of the result.
template <uint32_t choice>
ZK_FN uint32_t choose_bytes(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
    return __byte_perm(a, b, choice);
#else
    const uint64_t both = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i)
        result |= uint32_t(both >> (8 * (choice >> (4 * i) & 7u)) & 255u) << (8 * i);
    return result;
#endif
}

// What encode makes of finite values that round_by has rounded. It chooses bytes of the sums with
// the random bits, and so has nothing to cut off.
template <Storage storage>
ZK_FN StoredOctet<storage> encode_finite(const Words& random, const float* values) {
    static_assert(storage == Storage::bf16 || storage == Storage::bf16_split8, "other roundings");
    // split8 adds the high byte of each half.
    constexpr bool split = storage == Storage::bf16_split8;
    StoredOctet<storage> result;
    uint32_t sums[8];
    ZK_UNROLL
    for (int j = 0; j < 8; ++j) {
        const uint32_t word = random.w[j / 2], bits = float_bits(values[j]);
        sums[j] = split ? dot_bytes(word, 1u << (8 + 16 * (j % 2)), bits)
                        : dot_halves(word, 1u << (8 * (j % 2)), bits);
    }
    ZK_UNROLL
    for (int j = 0; j < 8; j += 2) {
        const uint32_t half = split ? 0x8000u : 0u;
        result.param.words[j / 2] = choose_bytes<0x7632>(sums[j] + half, sums[j + 1] + half);
    }
    if constexpr (split) {
        ZK_UNROLL
        for (int j = 0; j < 8; j += 4)
            result.residual.words[j / 4] =
                choose_bytes<0x5410>(choose_bytes<0x0051>(sums[j], sums[j + 1]),
                                     choose_bytes<0x0051>(sums[j + 2], sums[j + 3]));
    }
    return result;
}

// The values rounded by the random bits of rounding16.
template <Storage storage>
ZK_FN StoredOctet<storage> encode_rounded(const Words& random, const float* values) {
    if constexpr (storage == Storage::bf16 || storage == Storage::bf16_split8) {
        if (all_finite(values)) return encode_finite<storage>(random, values);
    }
    float rounded[8];
    ZK_UNROLL
    for (int j = 0; j < 8; ++j)
        rounded[j] = round_by<storage>((random.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu, values[j]);
    return encode<storage>(rounded);
}

}  // namespace zokern
