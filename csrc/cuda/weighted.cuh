// CUDA kernels of the weighted sum (row_sum.cuh has them) and of the dot products per entry.
#pragma once

#include "cuda/row_sum.cuh"

namespace megagnn::cuda {

// LANES lanes of a warp per entry, each a pack of columns in turn; their sums are added by shuffles, always
// in the same order.
template <class T, int VECTOR, int LANES>
__global__ void __launch_bounds__(kBlockThreads)
    gather_dot_kernel(const T* __restrict__ left, const T* __restrict__ right,
                      const int64_t* __restrict__ left_index, const int64_t* __restrict__ right_index,
                      Accumulator<T>* __restrict__ out, int64_t num_entries, int64_t width) {
  constexpr int kEntries = kBlockThreads / LANES;
  const int lane = threadIdx.x % LANES;
  const int64_t e = int64_t(blockIdx.x) * kEntries + threadIdx.x / LANES;
  Accumulator<T> sum = 0;
  if (e < num_entries) {
    const T *a = left + left_index[e] * width, *b = right + right_index[e] * width;
    for (int64_t column = lane * VECTOR; column < width; column += LANES * VECTOR) {
      const auto x = *reinterpret_cast<const Pack<T, VECTOR>*>(a + column);
      const auto y = *reinterpret_cast<const Pack<T, VECTOR>*>(b + column);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum += widen(x.element[v]) * widen(y.element[v]);
    }
  }
#pragma unroll
  for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane == 0 && e < num_entries) out[e] = sum;
}

template <class T>
void gather_weighted_sum(const void* values, const void* weight, const int64_t* index, const int64_t* ptr,
                         const int64_t* perm, void* out, int64_t num_rows, int64_t num_entries, int64_t width,
                         void* workspace, cudaStream_t stream) {
  const WeightedEntries<T> entries{static_cast<const T*>(values), perm, index,
                                   static_cast<const Accumulator<T>*>(weight), width};
  row_sum(entries, ptr, out, num_rows, num_entries, false, workspace, stream);
}

template <class T, int VECTOR, int LANES>
void launch_gather_dot(const T* left, const T* right, const int64_t* left_index, const int64_t* right_index,
                       Accumulator<T>* out, int64_t num_entries, int64_t width, cudaStream_t stream) {
  constexpr int kEntries = kBlockThreads / LANES;
  const dim3 grid(unsigned((num_entries + kEntries - 1) / kEntries)), block(kBlockThreads);
  MEGAGNN_LAUNCH((gather_dot_kernel<T, VECTOR, LANES>), grid, block, 0, stream, left, right, left_index,
                 right_index, out, num_entries, width);
}

template <class T>
void gather_dot(const void* left, const void* right, const int64_t* left_index, const int64_t* right_index,
                void* out, int64_t num_entries, int64_t width, cudaStream_t stream) {
  const T *a = static_cast<const T*>(left), *b = static_cast<const T*>(right);
  auto* to = static_cast<Accumulator<T>*>(out);
  constexpr int kVector = 16 / sizeof(T);
  if (!can_pack<T>(left, right, width)) {
    launch_gather_dot<T, 1, 8>(a, b, left_index, right_index, to, num_entries, width, stream);
  } else if (width <= 16 * kVector) {
    launch_gather_dot<T, kVector, 8>(a, b, left_index, right_index, to, num_entries, width, stream);
  } else {
    launch_gather_dot<T, kVector, 32>(a, b, left_index, right_index, to, num_entries, width, stream);
  }
}

}  // namespace megagnn::cuda
