// CUDA kernels of the scatter by unsorted indices. The order of atomic additions is not fixed, so neither are
// the last bits of a sum; the segment sum (row_sum.cuh) is the reproducible one.
#pragma once

#include "cuda/vector.cuh"

namespace megagnn::cuda {

constexpr int64_t kMaxBlocks = int64_t(1) << 20;  // threads then go on with a stride

inline dim3 blocks_for(int64_t num_threads) {
  const int64_t blocks = (num_threads + kBlockThreads - 1) / kBlockThreads;
  return dim3(unsigned(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

// One thread per element of values; neighbouring threads add to neighbouring addresses.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    scatter_add_kernel(const T* __restrict__ values, const int64_t* __restrict__ index, Accumulator<T>* sums,
                       int64_t num_elements, int64_t width) {
  const int64_t stride = int64_t(gridDim.x) * kBlockThreads;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < num_elements; i += stride)
    atomicAdd(sums + index[i / width] * width + i % width, widen(values[i]));
}

// One thread per element: rounds the sums.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    round_kernel(const Accumulator<T>* __restrict__ sums, T* __restrict__ out, int64_t num_elements) {
  const int64_t stride = int64_t(gridDim.x) * kBlockThreads;
  for (int64_t i = int64_t(blockIdx.x) * kBlockThreads + threadIdx.x; i < num_elements; i += stride)
    narrow(sums[i], out + i);
}

// sums is out itself, except for types that are not their own accumulator; it must be zero.
template <class T>
void scatter_add(const void* values, const int64_t* index, void* sums, void* out, int64_t num_rows,
                 int64_t num_entries, int64_t width, cudaStream_t stream) {
  const dim3 block(kBlockThreads);
  auto* to = static_cast<Accumulator<T>*>(sums);
  if (num_entries > 0) {
    const int64_t num_elements = num_entries * width;
    MEGAGNN_LAUNCH((scatter_add_kernel<T>), blocks_for(num_elements), block, 0, stream,
                   static_cast<const T*>(values), index, to, num_elements, width);
  }
  if (sums != out) {
    const int64_t num_elements = num_rows * width;
    MEGAGNN_LAUNCH((round_kernel<T>), blocks_for(num_elements), block, 0, stream, to, static_cast<T*>(out),
                   num_elements);
  }
}

}  // namespace megagnn::cuda
