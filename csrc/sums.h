// Sums of products so exact that the order of the terms does not show once they are rounded to
// float32, nor, but for once in about 2^40 sums, to float64.
#pragma once

#include "noise.h"

namespace zokern {

// high + low: the rounding errors of the running sum `high` are summed in `low`.
struct ExactSum {
    double high, low;
};

ZK_FN void add(ExactSum& sum, double x) {
    const double total = sum.high + x;
    const double back = total - sum.high;
    sum.low += (sum.high - (total - back)) + (x - back);
    sum.high = total;
}

ZK_FN void add(ExactSum& sum, const ExactSum& other) {
    add(sum, other.high);
    sum.low += other.low;
}

// An infinite sum has no rounding errors that mean anything.
ZK_FN double total(const ExactSum& sum) {
    return sum.low == sum.low ? sum.high + sum.low : sum.high;
}

// v·v, v·z and z·z.
struct ExactProducts {
    ExactSum vv, vz, zz;
};

// The products of two float32 are exact in float64.
ZK_FN void add_products(ExactProducts& sums, float v, float z) {
    add(sums.vv, double(v) * double(v));
    add(sums.vz, double(v) * double(z));
    add(sums.zz, double(z) * double(z));
}

ZK_FN void add(ExactProducts& sums, const ExactProducts& other) {
    add(sums.vv, other.vv);
    add(sums.vz, other.vz);
    add(sums.zz, other.zz);
}

}  // namespace zokern
