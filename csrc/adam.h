// Adam's step for one element, as the online-merging optimizers take it: what
// zokern/backends/reference/adam.py says.
#pragma once

#include "storage.h"

namespace zokern {

// A tensor's row of numbers, in the order of AdamNumbers in zokern/merging.py.
struct AdamNumbers {
    float sign;  // -1 to maximize
    float beta1, one_minus_beta1;
    float beta2, one_minus_beta2;
    float eps;
    float step;           // lr, corrected for the moments' bias
    float decay;          // lr · weight decay, 0 for none
    float alpha, weight;  // of τ and of Δ
    float scale;          // of what the mask keeps
    float ratio;          // that brings Δ back to its L1 norm
    float clip;           // of Δ, infinite for none
};
constexpr int kAdamNumbers = sizeof(AdamNumbers) / sizeof(float);

struct Moments {
    float first, second;
};

ZK_FN float divide32(float a, float b) {
#ifdef __CUDA_ARCH__
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

// Before they are rounded to the dtype of the state.
ZK_FN Moments next_moments(const AdamNumbers& n, float grad, Moments before) {
    const float g = n.sign * grad;
    return {fma32(n.one_minus_beta1, g, n.beta1 * before.first),
            fma32(n.one_minus_beta2 * g, g, n.beta2 * before.second)};
}

// Δ of moments that have been rounded to the dtype of the state.
ZK_FN float adam_delta(const AdamNumbers& n, Moments moments) {
    return divide32(moments.first, sqrt32(moments.second) + n.eps) * -n.step;
}

}  // namespace zokern
