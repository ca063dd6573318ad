// CUDA kernel of the segment maximum.
#pragma once

#include "cuda/vector.cuh"

namespace megagnn::cuda {

// One thread per row and pack of columns, over the entries in order, so that the first of equal ones stays;
// neighbouring threads read neighbouring addresses.
template <class T, int VECTOR>
__global__ void __launch_bounds__(kBlockThreads)
    segment_max_kernel(const T* __restrict__ values, const int64_t* __restrict__ ptr,
                       const int64_t* __restrict__ perm, T* __restrict__ out, int64_t* __restrict__ arg,
                       int64_t num_packs, int64_t packs_per_row) {
  const int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x;
  if (i >= num_packs) return;
  const int64_t row = i / packs_per_row, pack = i % packs_per_row;
  const int64_t begin = ptr[row], end = ptr[row + 1];
  Accumulator<T> best[VECTOR] = {};
  int64_t at[VECTOR];
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) at[v] = -1;
  for (int64_t k = begin; k < end; ++k) {
    const int64_t e = perm ? perm[k] : k;
    const auto read = reinterpret_cast<const Pack<T, VECTOR>*>(values)[e * packs_per_row + pack];
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) {
      const Accumulator<T> value = widen(read.element[v]);
      const bool better = k == begin || (!(value <= best[v]) && best[v] == best[v]);  // a NaN stays
      best[v] = better ? value : best[v];
      at[v] = better ? e : at[v];
    }
  }
  Pack<T, VECTOR> result;
#pragma unroll
  for (int v = 0; v < VECTOR; ++v) {
    narrow(best[v], &result.element[v]);
    arg[i * VECTOR + v] = at[v];
  }
  reinterpret_cast<Pack<T, VECTOR>*>(out)[i] = result;
}

template <class T, int VECTOR>
void launch_segment_max(const T* values, const int64_t* ptr, const int64_t* perm, T* out, int64_t* arg,
                        int64_t num_rows, int64_t width, cudaStream_t stream) {
  const int64_t packs_per_row = width / VECTOR, num_packs = num_rows * packs_per_row;
  const dim3 grid(unsigned((num_packs + kBlockThreads - 1) / kBlockThreads)), block(kBlockThreads);
  MEGAGNN_LAUNCH((segment_max_kernel<T, VECTOR>), grid, block, 0, stream, values, ptr, perm, out, arg,
                 num_packs, packs_per_row);
}

template <class T>
void segment_max(const void* values, const int64_t* ptr, const int64_t* perm, void* out, int64_t* arg,
                 int64_t num_rows, int64_t width, cudaStream_t stream) {
  const T* from = static_cast<const T*>(values);
  T* to = static_cast<T*>(out);
  if (can_pack<T>(values, out, width)) {
    launch_segment_max<T, 16 / sizeof(T)>(from, ptr, perm, to, arg, num_rows, width, stream);
  } else {
    launch_segment_max<T, 1>(from, ptr, perm, to, arg, num_rows, width, stream);
  }
}

}  // namespace megagnn::cuda
