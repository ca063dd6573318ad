// Kernels with one mistake each, behind a switch: the tests show that the emulation finds the mistake, and
// that it finds nothing where the switch is off.
#include "cuda/compat.h"

namespace {

enum Barrier { kBarrier, kMissing, kDivergentBranch, kReturnsBefore, kAgainstShuffle };

// Reverses a block's numbers through shared memory.
template <Barrier HOW>
__global__ void reverse_kernel(float* numbers) {
  __shared__ float tile[64];
  const unsigned me = threadIdx.x, size = blockDim.x;
  tile[me] = numbers[me];
  if (HOW == kReturnsBefore && me == 3) return;
  if (HOW == kDivergentBranch && me >= 32) {
    __syncthreads();
  } else if (HOW == kAgainstShuffle && me == 40) {
    __shfl_sync(0xffffffffu, 1.0f, 0);
  } else if (HOW != kMissing) {
    __syncthreads();
  }
  numbers[me] = tile[size - 1 - me];
}

// The sum of the numbers of a warp, in each of them.
template <bool SYNC>
__global__ void warp_sum_kernel(float* numbers) {
  MEGAGNN_DYNAMIC_SHARED(float, tile);
  const unsigned me = threadIdx.x;
  tile[me] = numbers[me];
  if (SYNC) __syncwarp();
  float sum = 0;
  for (int i = 0; i < warpSize; ++i) sum += tile[i];
  numbers[me] = sum;
}

enum Shuffle { kWholeWarp, kReturned, kNotInMask, kReadsOutside, kTwoCalls, kBadWidth, kReturnsLater };

// Adds the number of the next lane but 15.
template <Shuffle HOW>
__global__ void shuffle_kernel(float* numbers) {
  const unsigned lane = threadIdx.x % warpSize;
  if (HOW == kReturned && lane == 0) return;
  const unsigned mask = HOW == kNotInMask ? 0x0000ffffu : HOW == kReadsOutside ? 0x0fffffffu : 0xffffffffu;
  if (HOW == kReadsOutside && lane >= 28) return;
  if (HOW == kTwoCalls && lane == 7) {
    numbers[threadIdx.x] += __shfl_xor_sync(mask, numbers[threadIdx.x], 16);
    return;
  }
  if (HOW == kReturnsLater && lane == 31) {
    numbers[31] = 0;
    return;
  }
  numbers[threadIdx.x] += __shfl_xor_sync(mask, numbers[threadIdx.x], 16, HOW == kBadWidth ? 24 : 32);
}

// Each block adds what the block before it has written, which nothing puts in order.
__global__ void running_sum_kernel(float* numbers) {
  if (blockIdx.x > 0) numbers[blockIdx.x] += numbers[blockIdx.x - 1];
}

enum Total { kAtomic, kOneBlock, kManyBlocks };

// Adds all numbers but the first to it.
template <Total HOW>
__global__ void total_kernel(float* numbers) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x + 1;
  if (HOW == kAtomic) {
    atomicAdd(numbers, numbers[i]);
  } else {
    numbers[0] += numbers[i];
  }
}

enum Access { kInside, kGlobal, kStaticShared, kDynamicShared, kMisaligned };

template <Access HOW>
__global__ void access_kernel(float* numbers, float* out) {
  __shared__ float fixed[32];
  MEGAGNN_DYNAMIC_SHARED(float, dynamic);
  const unsigned me = threadIdx.x, beyond = me + 1;
  fixed[me] = dynamic[me] = 1;
  if (HOW == kGlobal) out[me] = numbers[beyond];
  if (HOW == kStaticShared) fixed[beyond] = 2;
  if (HOW == kDynamicShared) dynamic[beyond] = 2;
  if (HOW == kMisaligned) out[me] = reinterpret_cast<const float4*>(numbers + beyond % 8)->x;
  if (HOW == kInside) out[me] = numbers[me] + fixed[me] + dynamic[me];
}

__global__ void nothing_kernel() {}
__global__ void greedy_kernel() {}

}  // namespace

#define CASE(value, kernel, threads, shared_bytes, ...) \
  if (how == value) MEGAGNN_LAUNCH((kernel<value>), 1, threads, shared_bytes, nullptr, __VA_ARGS__)

extern "C" int reverse(int how, float* numbers) {
  CASE(kBarrier, reverse_kernel, 64, 0, numbers);
  CASE(kMissing, reverse_kernel, 64, 0, numbers);
  CASE(kDivergentBranch, reverse_kernel, 64, 0, numbers);
  CASE(kReturnsBefore, reverse_kernel, 64, 0, numbers);
  CASE(kAgainstShuffle, reverse_kernel, 64, 0, numbers);
  return int(cudaGetLastError());
}

extern "C" int warp_sum(int sync, float* numbers) {
  const size_t bytes = 32 * sizeof(float);
  if (sync) MEGAGNN_LAUNCH(warp_sum_kernel<true>, 1, 32, bytes, nullptr, numbers);
  if (!sync) MEGAGNN_LAUNCH(warp_sum_kernel<false>, 1, 32, bytes, nullptr, numbers);
  return int(cudaGetLastError());
}

extern "C" int shuffle(int how, int num_threads, float* numbers) {
  CASE(kWholeWarp, shuffle_kernel, num_threads, 0, numbers);
  CASE(kReturned, shuffle_kernel, num_threads, 0, numbers);
  CASE(kNotInMask, shuffle_kernel, num_threads, 0, numbers);
  CASE(kReadsOutside, shuffle_kernel, num_threads, 0, numbers);
  CASE(kTwoCalls, shuffle_kernel, num_threads, 0, numbers);
  CASE(kBadWidth, shuffle_kernel, num_threads, 0, numbers);
  CASE(kReturnsLater, shuffle_kernel, num_threads, 0, numbers);
  return int(cudaGetLastError());
}

extern "C" int total(int how, float* numbers) {
  if (how == kAtomic) MEGAGNN_LAUNCH(total_kernel<kAtomic>, 7, 8, 0, nullptr, numbers);
  if (how == kOneBlock) MEGAGNN_LAUNCH(total_kernel<kOneBlock>, 1, 56, 0, nullptr, numbers);
  if (how == kManyBlocks) MEGAGNN_LAUNCH(total_kernel<kManyBlocks>, 56, 1, 0, nullptr, numbers);
  return int(cudaGetLastError());
}

extern "C" int running_sum(int num_blocks, float* numbers) {
  MEGAGNN_LAUNCH(running_sum_kernel, num_blocks, 1, 0, nullptr, numbers);
  return int(cudaGetLastError());
}

// Buffers just as long as they must be, on the heap.
extern "C" int access(int how) {
  auto* numbers = new float[32]();
  auto* out = new float[32];
  const size_t bytes = 32 * sizeof(float);
  CASE(kInside, access_kernel, 32, bytes, numbers, out);
  CASE(kGlobal, access_kernel, 32, bytes, numbers, out);
  CASE(kStaticShared, access_kernel, 32, bytes, numbers, out);
  CASE(kDynamicShared, access_kernel, 32, bytes, numbers, out);
  CASE(kMisaligned, access_kernel, 8, bytes, numbers, out);
  delete[] numbers;
  delete[] out;
  return int(cudaGetLastError());
}

extern "C" int launch(int grid_x, int grid_y, int block_x, int block_z, int shared_bytes, int allowed_bytes) {
  const dim3 grid(grid_x, grid_y), block(block_x, 1, block_z);
  if (allowed_bytes) {
    cudaFuncSetAttribute(greedy_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, allowed_bytes);
    MEGAGNN_LAUNCH(greedy_kernel, grid, block, shared_bytes, nullptr);
  } else {
    MEGAGNN_LAUNCH(nothing_kernel, grid, block, shared_bytes, nullptr);
  }
  return int(cudaGetLastError());
}
