// CUDA kernels of the segment sum and mean (row_sum.cuh has them) and of the gather.
#pragma once

#include "cuda/row_sum.cuh"

namespace megagnn::cuda {

// One thread per pack of columns of the result; neighbouring threads write neighbouring addresses.
template <class T, int VECTOR>
__global__ void __launch_bounds__(kBlockThreads)
    gather_kernel(const T* __restrict__ values, const int64_t* __restrict__ index, T* __restrict__ out,
                  int64_t num_packs, int64_t packs_per_row) {
  const int64_t stride = int64_t(gridDim.x) * kBlockThreads;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < num_packs; i += stride) {
    const int64_t e = i / packs_per_row, pack = i % packs_per_row;
    reinterpret_cast<Pack<T, VECTOR>*>(out)[i] =
        reinterpret_cast<const Pack<T, VECTOR>*>(values)[index[e] * packs_per_row + pack];
  }
}

template <class T, int VECTOR>
void launch_gather(const T* values, const int64_t* index, T* out, int64_t num_entries, int64_t width,
                   cudaStream_t stream) {
  const int64_t packs_per_row = width / VECTOR, num_packs = num_entries * packs_per_row;
  const int64_t blocks = (num_packs + kBlockThreads - 1) / kBlockThreads;
  const dim3 grid(unsigned(blocks < (int64_t(1) << 20) ? blocks : (int64_t(1) << 20))), block(kBlockThreads);
  MEGAGNN_LAUNCH((gather_kernel<T, VECTOR>), grid, block, 0, stream, values, index, out, num_packs,
                 packs_per_row);
}

template <class T>
void segment_sum(const void* values, const int64_t* ptr, const int64_t* perm, void* out, int64_t num_rows,
                 int64_t num_entries, int64_t width, bool mean, void* workspace, cudaStream_t stream) {
  row_sum(PlainEntries<T>{static_cast<const T*>(values), perm, width}, ptr, out, num_rows, num_entries, mean,
          workspace, stream);
}

template <class T>
void gather(const void* values, const int64_t* index, void* out, int64_t num_entries, int64_t width,
            cudaStream_t stream) {
  const T* from = static_cast<const T*>(values);
  T* to = static_cast<T*>(out);
  if (can_pack<T>(values, out, width)) {
    launch_gather<T, 16 / sizeof(T)>(from, index, to, num_entries, width, stream);
  } else {
    launch_gather<T, 1>(from, index, to, num_entries, width, stream);
  }
}

}  // namespace megagnn::cuda
