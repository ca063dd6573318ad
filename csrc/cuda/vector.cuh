// Scalar types, accumulators and packs that the CUDA kernels share.
#pragma once

#include "cuda/compat.h"

namespace megagnn::cuda {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 128;

template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<__nv_bfloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(double x, double* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* out) { *out = __float2bfloat16_rn(x); }

// VECTOR elements that one thread loads at once, 16 bytes where the rows allow it.
template <class T, int VECTOR>
struct alignas(sizeof(T) * VECTOR) Pack {
  T element[VECTOR];
};

// 16-byte accesses where the width and both addresses allow them.
template <class T>
inline bool can_pack(const void* values, const void* out, int64_t width) {
  const bool aligned =
      reinterpret_cast<uintptr_t>(values) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  return aligned && width % int64_t(16 / sizeof(T)) == 0;
}

}  // namespace megagnn::cuda
