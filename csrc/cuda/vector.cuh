// Scalar types, accumulators, packs and the division of work over warps that the CUDA kernels share.
#pragma once

#include "cuda/compat.h"

namespace megagnn::cuda {

constexpr int kWarp = 32;
constexpr int kBlockThreads = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

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

// The sum of x over a warp, on every lane, always added in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ __forceinline__ int64_t thread_number() {
  return int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
}
__device__ __forceinline__ int64_t warp_number() {
  return int64_t(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
}
// The channel of this lane: the second dimension of the grid counts tiles of 32.
__device__ __forceinline__ int64_t channel() { return int64_t(blockIdx.y) * kWarp + threadIdx.x % kWarp; }

// The grid of a warp for each of `count` edges or rows, and for each 32 channels of `width`.
inline dim3 warps_for(int64_t count, int64_t width = 1) {
  constexpr int64_t kWarps = kBlockThreads / kWarp;
  return dim3(unsigned((count + kWarps - 1) / kWarps), unsigned((width + kWarp - 1) / kWarp));
}
inline dim3 threads_for(int64_t count) { return dim3(unsigned((count + kBlockThreads - 1) / kBlockThreads)); }

}  // namespace megagnn::cuda
