// Moves along noise.
#pragma once

#include "unit.h"

namespace zokern {

// Moves octets, kThreads apart, along every direction: K directions, or as many as the batch has
// where K is 0. Where every scale is 1, `scaled` may be false.
template <Law law, int K, bool scaled, int octets, class AnyBatch>
ZK_FN void displace(const AnyBatch& batch, const Operand& operand, uint64_t octet_index,
                    float (&values)[octets][8]) {
    const uint32_t directions = K ? K : batch.directions;
#ifdef __CUDA_ARCH__
#pragma unroll(K ? K : 1)
#endif
    for (uint32_t k = 0; k < directions; ++k) {
        const Factor factor = batch.factors[operand.first_factor + k];
        const BatchStream stream = {batch.keys, operand.c1, operand.c2, batch.draws[k]};
        if (scaled && factor.scale != 1.0f) {
            ZK_UNROLL
            for (int i = 0; i < octets; ++i) {
                ZK_UNROLL
                for (int j = 0; j < 8; ++j) values[i][j] = factor.scale * values[i][j];
            }
        }
        ZK_UNROLL
        for (int i = 0; i < octets; ++i) {
            float z[8];
            octet<law>(stream, octet_index + i * kThreads, z);
            ZK_UNROLL
            for (int j = 0; j < 8; ++j) values[i][j] = fma32(factor.coeff, z[j], values[i][j]);
        }
    }
}

}  // namespace zokern
