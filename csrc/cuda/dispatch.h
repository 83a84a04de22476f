// From run-time choices to the template arguments of the kernels: each function calls `f` with a
// std::integral_constant.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../storage.h"

namespace zokern {

template <auto value>
using Constant = std::integral_constant<decltype(value), value>;

// Laws that give directions.
template <class F>
void with_direction(Law law, const F& f) {
    switch (law) {
        case Law::gauss16:
            return f(Constant<Law::gauss16>());
        case Law::gauss32:
            return f(Constant<Law::gauss32>());
        case Law::rademacher:
            return f(Constant<Law::rademacher>());
        case Law::normal:
            return f(Constant<Law::normal>());
        default:
            throw std::runtime_error("law " + std::to_string(int(law)) + " gives no directions");
    }
}

template <class F>
void with_law(Law law, const F& f) {
    switch (law) {
        case Law::uniform32:
            return f(Constant<Law::uniform32>());
        case Law::rounding16:
            return f(Constant<Law::rounding16>());
        default:
            return with_direction(law, f);
    }
}

template <class F>
void with_storage(Storage storage, const F& f) {
    switch (storage) {
        case Storage::fp32:
            return f(Constant<Storage::fp32>());
        case Storage::bf16:
            return f(Constant<Storage::bf16>());
        case Storage::fp16:
            return f(Constant<Storage::fp16>());
        case Storage::bf16_split16:
            return f(Constant<Storage::bf16_split16>());
        case Storage::bf16_split8:
            return f(Constant<Storage::bf16_split8>());
        case Storage::fp16_split:
            return f(Constant<Storage::fp16_split>());
    }
    throw std::runtime_error("unknown storage " + std::to_string(int(storage)));
}

// A storage, and whether the values are masters', which no storage with residuals goes with.
template <class F>
void with_masters(Storage storage, bool masters, const F& f) {
    with_storage(storage, [&](auto s) {
        if constexpr (residual_bytes(s()) == 0) {
            if (masters) return f(s, Constant<true>());
        }
        f(s, Constant<false>());
    });
}

// The numbers of directions that have kernels of their own; 0 stands for any number.
template <Law law, class F>
void with_directions(uint32_t directions, const F& f) {
    if (directions == 1) return f(Constant<1>());
    if (directions == 2) return f(Constant<2>());
    if constexpr (law == Law::gauss16) {
        if (directions == 4) return f(Constant<4>());
    }
    f(Constant<0>());
}

}  // namespace zokern
