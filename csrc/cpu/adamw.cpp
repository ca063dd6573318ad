// Compiled once for each SIMD level, as csrc/cpu/segment.cpp is, and under the same rule: <cstdint> and
// headers of the project alone.
#include "cpu/adamw.h"

#include "cpu/vector.h"

namespace megagnn::cpu::MEGAGNN_SIMD {
namespace {

inline float square_root(float x) { return __builtin_sqrtf(x); }
inline double square_root(double x) { return __builtin_sqrt(x); }

// One pass, left to the compiler's vectoriser: no element depends on another, and every operation is rounded
// on its own (-ffp-contract=off), so vectors, tail and levels make the same bits. Stores are ordinary ones:
// the lines they go to have just been read, and non-temporal stores would throw them out of the cache.
// Software prefetch gains nothing either: the streams are sequential.
template <bool ROUNDED, class T, class Grad>
void update(const AdamWBuffers& buffers, const AdamWScalars& scalars, int64_t begin, int64_t end) {
  T* __restrict__ weights = static_cast<T*>(buffers.weights);
  T* __restrict__ exp_avg = static_cast<T*>(buffers.exp_avg);
  T* __restrict__ exp_avg_sq = static_cast<T*>(buffers.exp_avg_sq);
  const Grad* __restrict__ grads = static_cast<const Grad*>(buffers.grad);
  BFloat16* __restrict__ rounded = static_cast<BFloat16*>(buffers.rounded);
  const T grad_scale = T(scalars.grad_scale), decay = T(scalars.decay), step_size = T(scalars.step_size);
  const T beta1 = T(scalars.beta1), one_minus_beta1 = T(scalars.one_minus_beta1);
  const T beta2 = T(scalars.beta2), one_minus_beta2 = T(scalars.one_minus_beta2);
  const T root_scale = T(scalars.root_scale), eps = T(scalars.eps);
  for (int64_t i = begin; i < end; ++i) {
    const T grad = grad_scale * T(widen(grads[i]));
    const T m = beta1 * exp_avg[i] + one_minus_beta1 * grad;
    const T v = beta2 * exp_avg_sq[i] + one_minus_beta2 * (grad * grad);
    const T w = decay * weights[i] - step_size * (m / (root_scale * square_root(v) + eps));
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    weights[i] = w;
    if constexpr (ROUNDED) narrow(w, rounded + i);
  }
}

// The lanes are the same at every level, and so are the bits.
template <class T>
double square_sum(const void* values_pointer, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = 32;
  const T* values = static_cast<const T*>(values_pointer);
  Accumulator<T> sums[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const Accumulator<T> value = widen(values[i + lane]);
      sums[lane] += value * value;
    }
  }
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += double(sums[lane]);
  for (; i < end; ++i) total += double(widen(values[i])) * double(widen(values[i]));
  return total;
}

}  // namespace

extern const AdamWKernels adamw;
const AdamWKernels adamw = {
    {{update<false, float, float>, nullptr, update<false, float, BFloat16>},
     {nullptr, update<false, double, double>, nullptr},
     {}},
    {{update<true, float, float>, nullptr, update<true, float, BFloat16>}, {}, {}},
    {square_sum<float>, square_sum<double>, square_sum<BFloat16>},
};

}  // namespace megagnn::cpu::MEGAGNN_SIMD
