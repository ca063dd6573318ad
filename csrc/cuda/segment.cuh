// CUDA kernels of the segment sum and the gather. No atomics: a sum is made in an order that depends on the
// row alone.
#pragma once

#include "cuda/vector.cuh"

namespace megagnn::cuda {

// One warp per row; its lanes are (32 / LANES) entries x LANES packs of columns, so that narrow rows read
// several entries at once. Entry lanes are added at the end by shuffles, always in the same order.
template <class T, int VECTOR, int LANES>
__global__ void __launch_bounds__(kBlockThreads)
    segment_sum_kernel(const T* __restrict__ values, const int64_t* __restrict__ ptr,
                       const int64_t* __restrict__ perm, T* __restrict__ out, int64_t num_rows,
                       int64_t width) {
  constexpr int kEntryLanes = kWarp / LANES;
  const int lane = threadIdx.x % kWarp;
  const int column_lane = lane % LANES, entry_lane = lane / LANES;
  const int64_t row = int64_t(blockIdx.x) * (kBlockThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= num_rows) return;  // the whole warp leaves together
  const int64_t begin = ptr[row], end = ptr[row + 1];
  for (int64_t first = 0; first < width; first += LANES * VECTOR) {
    const int64_t column = first + column_lane * VECTOR;
    Accumulator<T> sum[VECTOR] = {};
    if (column < width) {
#pragma unroll 4
      for (int64_t k = begin + entry_lane; k < end; k += kEntryLanes) {
        const int64_t e = perm ? perm[k] : k;
        const auto pack = *reinterpret_cast<const Pack<T, VECTOR>*>(values + e * width + column);
#pragma unroll
        for (int v = 0; v < VECTOR; ++v) sum[v] += widen(pack.element[v]);
      }
    }
#pragma unroll
    for (int offset = LANES; offset < kWarp; offset *= 2) {
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum[v] += __shfl_xor_sync(0xffffffffu, sum[v], offset);
    }
    if (entry_lane == 0 && column < width) {
      Pack<T, VECTOR> pack;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) narrow(sum[v], &pack.element[v]);
      *reinterpret_cast<Pack<T, VECTOR>*>(out + row * width + column) = pack;
    }
  }
}

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
void launch_segment_sum(const T* values, const int64_t* ptr, const int64_t* perm, T* out, int64_t num_rows,
                        int64_t width, cudaStream_t stream) {
  constexpr int kRows = kBlockThreads / kWarp;
  const dim3 grid(unsigned((num_rows + kRows - 1) / kRows)), block(kBlockThreads);
  const int64_t packs = width / VECTOR;
  if (packs <= 1) {
    MEGAGNN_LAUNCH((segment_sum_kernel<T, VECTOR, 1>), grid, block, 0, stream, values, ptr, perm, out,
                   num_rows, width);
  } else if (packs <= 4) {
    MEGAGNN_LAUNCH((segment_sum_kernel<T, VECTOR, 4>), grid, block, 0, stream, values, ptr, perm, out,
                   num_rows, width);
  } else if (packs <= 16) {
    MEGAGNN_LAUNCH((segment_sum_kernel<T, VECTOR, 16>), grid, block, 0, stream, values, ptr, perm, out,
                   num_rows, width);
  } else {
    MEGAGNN_LAUNCH((segment_sum_kernel<T, VECTOR, 32>), grid, block, 0, stream, values, ptr, perm, out,
                   num_rows, width);
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
                 int64_t width, cudaStream_t stream) {
  const T* from = static_cast<const T*>(values);
  T* to = static_cast<T*>(out);
  if (can_pack<T>(values, out, width)) {
    launch_segment_sum<T, 16 / sizeof(T)>(from, ptr, perm, to, num_rows, width, stream);
  } else {
    launch_segment_sum<T, 1>(from, ptr, perm, to, num_rows, width, stream);
  }
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
