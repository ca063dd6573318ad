// Sums over CSR rows: what the kernels of the segment sum (segment.cuh) and of the weighted sum
// (weighted.cuh) are made of. No atomics: the order of a sum is given by the rows alone, so the bits are the
// same every time.
#pragma once

#include "cuda/row_sum.h"
#include "cuda/vector.cuh"

namespace megagnn::cuda {

constexpr int kWarps = kBlockThreads / kWarp;

// Entry k of ptr's order: where it lies, and what it is multiplied by.
// Blocks that a multiprocessor must hold. Left to itself the compiler aims for more, and spills a register or
// two.
constexpr int kMinBlocks = 4;

template <class Scalar>
struct PlainEntries {
  using T = Scalar;
  const T* values;
  const int64_t* perm;  // may be null
  int64_t width;

  __device__ const T* from(int64_t k) const { return values + (perm ? perm[k] : k) * width; }
  __device__ Accumulator<T> weight(int64_t) const { return Accumulator<T>(1); }
};

template <class Scalar>
struct WeightedEntries {
  using T = Scalar;
  const T* values;
  const int64_t *perm, *index;
  const Accumulator<T>* weights;
  int64_t width;

  __device__ const T* from(int64_t k) const { return values + index[perm ? perm[k] : k] * width; }
  __device__ Accumulator<T> weight(int64_t k) const { return weights[perm ? perm[k] : k]; }
};

// Adds up one pack of columns over the entries first, first + step, ... below end, then over the lanes of the
// warp that hold the same columns (LANES apart), always in the same order. All lanes of the warp must call
// it.
template <int VECTOR, int LANES, class Entries>
__device__ __forceinline__ void sum_entries(const Entries& entries, int64_t first, int64_t end, int64_t step,
                                            int64_t column, Accumulator<typename Entries::T>* sum) {
  using T = typename Entries::T;
  if (column < entries.width) {
#pragma unroll 4
    for (int64_t k = first; k < end; k += step) {
      const auto pack = *reinterpret_cast<const Pack<T, VECTOR>*>(entries.from(k) + column);
      const Accumulator<T> weight = entries.weight(k);
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) sum[v] += weight * widen(pack.element[v]);
    }
  }
#pragma unroll
  for (int offset = LANES; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int v = 0; v < VECTOR; ++v) sum[v] += __shfl_xor_sync(kAllLanes, sum[v], offset);
  }
}

// One warp per row; its lanes are (32 / LANES) entries x LANES packs of columns, so that narrow rows read
// several entries at once. Rows longer than kSplitEntries are left to the two kernels below.
template <int VECTOR, int LANES, class Entries>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks)
    row_sum_kernel(Entries entries, const int64_t* __restrict__ ptr, typename Entries::T* __restrict__ out,
                   int64_t num_rows, bool mean) {
  using T = typename Entries::T;
  constexpr int kEntryLanes = kWarp / LANES;
  const int lane = threadIdx.x % kWarp;
  const int column_lane = lane % LANES, entry_lane = lane / LANES;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= num_rows) return;  // the whole warp leaves together
  const int64_t begin = ptr[row], end = ptr[row + 1];
  if (end - begin > kSplitEntries) return;
  const Accumulator<T> count = Accumulator<T>(mean && end > begin ? end - begin : 1);
  for (int64_t first = 0; first < entries.width; first += LANES * VECTOR) {
    const int64_t column = first + column_lane * VECTOR;
    Accumulator<T> sum[VECTOR] = {};
    sum_entries<VECTOR, LANES>(entries, begin + entry_lane, end, int64_t(kEntryLanes), column, sum);
    if (entry_lane == 0 && column < entries.width) {
      Pack<T, VECTOR> pack;
#pragma unroll
      for (int v = 0; v < VECTOR; ++v) narrow(mean ? sum[v] / count : sum[v], &pack.element[v]);
      *reinterpret_cast<Pack<T, VECTOR>*>(out + row * entries.width + column) = pack;
    }
  }
}

// The row that entry k of ptr's order belongs to.
__device__ __forceinline__ int64_t row_of(const int64_t* ptr, int64_t num_rows, int64_t k) {
  int64_t low = 0, high = num_rows;  // ptr[low] <= k < ptr[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (ptr[middle] <= k) ? low = middle : high = middle;
  }
  return low;
}

// [Note: giant rows] ptr's order is cut every kSplitEntries entries. A row longer than that reaches over a
// cut, so a piece holds at most two parts of such rows: one that begins in an earlier piece or at its first
// entry (slot 0 of parts, (num_pieces, 2, width)), and one that begins later in it (slot 1).
//
// One block per piece; its warps take entries in turn, lanes as in row_sum_kernel, and the warps' sums are
// added in order. Blocks without a long row leave at once.
template <int VECTOR, int LANES, class Entries>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks)
    split_row_kernel(Entries entries, const int64_t* __restrict__ ptr,
                     Accumulator<typename Entries::T>* __restrict__ parts, int64_t num_rows,
                     int64_t num_entries) {
  using A = Accumulator<typename Entries::T>;
  constexpr int kEntryLanes = kWarp / LANES;
  __shared__ A shared[kWarps * LANES * VECTOR];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int column_lane = lane % LANES, entry_lane = lane / LANES;
  const int64_t piece = blockIdx.x, first = piece * kSplitEntries;
  const int64_t last = first + kSplitEntries < num_entries ? first + kSplitEntries : num_entries;
  const int64_t first_row = row_of(ptr, num_rows, first), last_row = row_of(ptr, num_rows, last - 1);
  for (int slot = 0; slot < 2; ++slot) {
    const int64_t row = slot ? last_row : first_row, row_begin = ptr[row], row_end = ptr[row + 1];
    if (row_end - row_begin <= kSplitEntries || (slot && last_row == first_row)) continue;  // the whole block
    const int64_t begin = row_begin > first ? row_begin : first, end = row_end < last ? row_end : last;
    for (int64_t columns = 0; columns < entries.width; columns += LANES * VECTOR) {
      const int64_t column = columns + column_lane * VECTOR;
      A sum[VECTOR] = {};
      sum_entries<VECTOR, LANES>(entries, begin + warp * kEntryLanes + entry_lane, end,
                                 int64_t(kWarps * kEntryLanes), column, sum);
      if (entry_lane == 0) {
        for (int v = 0; v < VECTOR; ++v) shared[(warp * LANES + column_lane) * VECTOR + v] = sum[v];
      }
      __syncthreads();
      for (int i = threadIdx.x; i < LANES * VECTOR; i += kBlockThreads) {
        A total = shared[i];
        for (int w = 1; w < kWarps; ++w) total += shared[w * LANES * VECTOR + i];
        if (columns + i < entries.width) parts[(piece * 2 + slot) * entries.width + columns + i] = total;
      }
      __syncthreads();
    }
  }
}

// One block per piece, one thread per column in turn: where a long row begins in the piece, adds its parts in
// order and writes the row; see [Note: giant rows].
template <class T>
__global__ void __launch_bounds__(kBlockThreads, kMinBlocks)
    join_row_kernel(const Accumulator<T>* __restrict__ parts, const int64_t* __restrict__ ptr,
                    T* __restrict__ out, int64_t num_rows, int64_t num_entries, int64_t width, bool mean) {
  const int64_t piece = blockIdx.x, first = piece * kSplitEntries;
  const int64_t last = first + kSplitEntries < num_entries ? first + kSplitEntries : num_entries;
  const int64_t row = row_of(ptr, num_rows, last - 1), begin = ptr[row], end = ptr[row + 1];
  if (end - begin <= kSplitEntries || begin < first) return;  // the whole block leaves together
  const int64_t last_piece = (end - 1) / kSplitEntries;
  const Accumulator<T> count = Accumulator<T>(mean ? end - begin : 1);
  for (int64_t c = threadIdx.x; c < width; c += kBlockThreads) {
    Accumulator<T> sum = parts[(piece * 2 + (begin > first)) * width + c];
    for (int64_t p = piece + 1; p <= last_piece; ++p) sum += parts[p * 2 * width + c];
    narrow(mean ? sum / count : sum, out + row * width + c);
  }
}

template <int VECTOR, int LANES, class Entries>
void launch_row_sum(const Entries& entries, const int64_t* ptr, typename Entries::T* out, int64_t num_rows,
                    int64_t num_entries, bool mean, void* workspace, cudaStream_t stream) {
  using T = typename Entries::T;
  const dim3 block(kBlockThreads), grid(unsigned((num_rows + kWarps - 1) / kWarps));
  MEGAGNN_LAUNCH((row_sum_kernel<VECTOR, LANES, Entries>), grid, block, 0, stream, entries, ptr, out,
                 num_rows, mean);
  if (num_entries <= kSplitEntries) return;
  auto* parts = static_cast<Accumulator<T>*>(workspace);
  const dim3 pieces(unsigned((num_entries + kSplitEntries - 1) / kSplitEntries));
  MEGAGNN_LAUNCH((split_row_kernel<VECTOR, LANES, Entries>), pieces, block, 0, stream, entries, ptr, parts,
                 num_rows, num_entries);
  MEGAGNN_LAUNCH((join_row_kernel<T>), pieces, block, 0, stream, parts, ptr, out, num_rows, num_entries,
                 entries.width, mean);
}

template <int VECTOR, class Entries>
void choose_lanes(const Entries& entries, const int64_t* ptr, typename Entries::T* out, int64_t num_rows,
                  int64_t num_entries, bool mean, void* workspace, cudaStream_t stream) {
  const int64_t packs = entries.width / VECTOR;
  if (packs <= 1) {
    launch_row_sum<VECTOR, 1>(entries, ptr, out, num_rows, num_entries, mean, workspace, stream);
  } else if (packs <= 4) {
    launch_row_sum<VECTOR, 4>(entries, ptr, out, num_rows, num_entries, mean, workspace, stream);
  } else if (packs <= 16) {
    launch_row_sum<VECTOR, 16>(entries, ptr, out, num_rows, num_entries, mean, workspace, stream);
  } else {
    launch_row_sum<VECTOR, 32>(entries, ptr, out, num_rows, num_entries, mean, workspace, stream);
  }
}

// workspace: row_sum_workspace bytes.
template <class Entries>
void row_sum(const Entries& entries, const int64_t* ptr, void* out, int64_t num_rows, int64_t num_entries,
             bool mean, void* workspace, cudaStream_t stream) {
  using T = typename Entries::T;
  T* to = static_cast<T*>(out);
  if (can_pack<T>(entries.values, out, entries.width)) {
    choose_lanes<16 / sizeof(T)>(entries, ptr, to, num_rows, num_entries, mean, workspace, stream);
  } else {
    choose_lanes<1>(entries, ptr, to, num_rows, num_entries, mean, workspace, stream);
  }
}

}  // namespace megagnn::cuda
