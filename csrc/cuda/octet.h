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

}  // namespace zokern
