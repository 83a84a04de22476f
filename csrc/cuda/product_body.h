// The kernel of inner products with noise: partial sums of each block.
#pragma once

#include "context.h"
#include "unit.h"

namespace zokern {

// Of every kThreads-th unit of a block's share.
template <Law law>
ZK_FN ExactProducts thread_products(const ProductBatch& batch, uint32_t block, uint32_t thread) {
    const uint32_t which = find_operand(batch, block);
    const ProductOperand& operand = batch.operands[which];
    const Share share = share_of(batch, which, block);
    const BatchStream stream = {batch.keys, operand.c1, operand.c2, batch.draw};
    ExactProducts sums{};
    for (uint64_t index = share.begin + thread; index < share.end; index += kThreads) {
        const Unit unit = locate(operand, index);
        float v[8], z[8];
        load_dense(operand.vector, unit, v);
        octet<law>(stream, unit.octet_index, z);
        ZK_UNROLL
        for (int j = 0; j < 8; ++j) add_products(sums, v[j], unit.mask >> j & 1u ? z[j] : 0.0f);
    }
    return sums;
}

// `sums` is kThreads of them that the block's threads share.
template <Law law, class Block>
ZK_FN void product_body(Block block, const ProductBatch& batch, ExactProducts* sums) {
    block.phase([&](uint32_t thread) {
        sums[thread] = thread_products<law>(batch, block.block(), thread);
    });
    for (uint32_t count = kThreads / 2; count > 0; count /= 2) {
        block.phase([&](uint32_t thread) {
            if (thread < count) add(sums[thread], sums[thread + count]);
        });
    }
    block.phase([&](uint32_t thread) {
        if (thread == 0) batch.partials[block.block()] = sums[0];
    });
}

}  // namespace zokern
