// What every kernel header includes. The launch macro, in place of <<<>>>, lets the same source be compiled
// for the processor by a header that emulates CUDA threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#define MEGAGNN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
