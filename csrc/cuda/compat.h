// What every kernel header includes: CUDA, or where the compiler is not nvcc, its emulation on the processor,
// which the tests bring (tests/cuda/emulation in the include path).
// Two macros stand for what C++ has no words for: MEGAGNN_LAUNCH, in place of <<<>>>, and
// MEGAGNN_DYNAMIC_SHARED(T, name), which declares T* name, the block's dynamic shared memory, aligned to 16
// bytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#define MEGAGNN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define MEGAGNN_DYNAMIC_SHARED(T, name)                          \
  extern __shared__ __align__(16) char megagnn_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(megagnn_dynamic_shared)

#else

#include "emulation.h"

#endif
