// The activations with their derivatives, on vectors of the SIMD level that is being compiled. Included like
// cpu/vector.h.
#pragma once

#include "cpu/math.h"
#include "edge_block.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

// Value, first and second derivative of the activation.
template <class T>
struct Jet {
  Vec<T> value, first, second;
};

template <class T, int ACTIVATION>
inline __attribute__((always_inline)) Jet<T> activate(Vec<T> x) {
  if constexpr (ACTIVATION == kSiLU) {
    const Logistic<T> s = logistic<T>(x);
    const Vec<T> y = x * s.value, product = s.value * s.rest;
    return {y, s.value + x * product, product * (T(2) + x - T(2) * y)};
  } else {
    const Vec<T> zero = {}, one = broadcast(T(1));
    return {x < T(0) ? zero : x, x > T(0) ? one : zero, zero};
  }
}

}  // namespace
}  // namespace megagnn::cpu::MEGAGNN_SIMD
