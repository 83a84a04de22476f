// What one element of a merging optimizer's step comes to; see
// zokern/backends/reference/merging.py.
#pragma once

#include "magnitudes.h"
#include "merging.h"

namespace zokern {

// What is made of the Δ that the mask keeps; of 0, 0.
ZK_FN float scaled_delta(const AdamNumbers& n, float delta) {
    const float scaled = n.ratio * (n.scale * delta);
    return scaled > n.clip ? n.clip : scaled < -n.clip ? -n.clip : scaled;
}

// x, or 0 where its sign is not that of the sum. A sum that is NaN keeps it.
ZK_FN float agreeing(float x, bool positive, bool negative) {
    return (positive && x < 0.0f) || (negative && x > 0.0f) ? 0.0f : x;
}

// What τ and Δ add to the parameter together.
template <Method method>
ZK_FN float consensus(const AdamNumbers& n, float tau, float delta) {
    if constexpr (method == Method::ties_paper) {
        const float a = n.alpha * tau, b = n.weight * delta, sum = a + b;
        if (sum == 0.0f) return 0.0f;
        return agreeing(a, sum > 0.0f, sum < 0.0f) + agreeing(b, sum > 0.0f, sum < 0.0f);
    } else if constexpr (method == Method::ties) {
        const float sum = tau + delta;
        const bool positive = sum >= 0.0f, negative = sum < 0.0f;
        return fma32(n.alpha, agreeing(tau, positive, negative),
                     n.weight * agreeing(delta, positive, negative));
    } else {
        return fma32(n.alpha, tau, n.weight * delta);
    }
}

ZK_FN float decayed(const AdamNumbers& n, float value) {
    return n.decay != 0.0f ? fma32(-n.decay, value, value) : value;
}

// The parameter's new value where the step merges; `cached` is what the steps since the last merge
// have added to it.
template <Method method>
ZK_FN float merged(const AdamNumbers& n, float value, float cached, float tau, float delta) {
    if constexpr (method == Method::ema) {
        const float moved = decayed(n, value + delta);
        return fma32(n.alpha, tau - moved, moved);
    } else {
        return decayed(n, (value - cached) + consensus<method>(n, tau, scaled_delta(n, delta)));
    }
}

}  // namespace zokern
