// Emulates CUDA threads on the processor, so that the kernels, the same sources, run in tests on machines
// without a GPU: compat.h includes this header where the compiler is not nvcc. A block's threads are fibers
// that take turns; blocks run one after another. Some hundred times slower than the CPU kernels.
//
// What it finds, by a message that names kernel, block, thread and line (megagnn_cuda_error_string):
// - barriers or warp exchanges in divergent code; masks that name lanes absent or gone, or not the caller;
// - launches outside the limits of a device, more dynamic shared memory than was asked for.
// A missing barrier shows as a wrong result: threads and blocks run in forward, reverse or random order, one
// to its next barrier before another starts, and shared memory is full of NaN when a block starts.
// Compiled with -fsanitize=address,bounds,alignment: accesses outside a buffer or an array, misaligned ones.
// Compiled with -fsanitize=thread: races, within a block and between blocks; see race.h.
//
// What it cannot show: speed, rounding of the fast intrinsics, missing fences, more static shared memory than
// 48 KiB (ptxas refuses that by itself). It has no inline PTX, no tensor cores, no asynchronous copies, no
// cooperative groups, no streams that overlap.
#pragma once

// Before the macros below, some of which are names that the standard library also uses.
#include "device.h"
#include "fiber.h"
#include "launch.h"
#include "race.h"
#include "scheduler.h"
#include "types.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)
#define __shared__ static thread_local  // one block runs at a time: see fill_static_shared

#define MEGAGNN_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                   \
  ::megagnn::emulation::launch(#kernel, __PRETTY_FUNCTION__, ::megagnn::emulation::Site::here(), kernel, \
                               grid, block, shared_bytes, stream)(__VA_ARGS__)
#define MEGAGNN_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::megagnn::emulation::state.dynamic_shared.get())
