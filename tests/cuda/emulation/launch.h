// Launches, with the limits that a device has, and the few functions of the CUDA runtime that launchers use.
#pragma once

#include <link.h>

#include <utility>

#include "scheduler.h"

namespace megagnn::emulation {

constexpr size_t kDefaultSharedBytes = size_t(48) << 10;
constexpr size_t kLargestSharedBytes = size_t(227) << 10;  // compute capability 9.0; 8.0 has 163 KiB

// Static shared variables are thread-local ones, because those of one library lie in one piece that can be
// found. This one has it mapped, which is done at its first use.
inline thread_local char shared_anchor;

inline std::pair<char*, size_t> find_static_shared() {
  static const auto visit = [](dl_phdr_info* info, size_t, void* found) {
    const auto address = reinterpret_cast<uintptr_t>(&state);
    bool ours = false;
    size_t bytes = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& header = info->dlpi_phdr[i];
      const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
      ours |= header.p_type == PT_LOAD && begin <= address && address < begin + header.p_memsz;
      if (header.p_type == PT_TLS) bytes = header.p_memsz;
    }
    auto* const memory = static_cast<char*>(info->dlpi_tls_data);
    if (ours && memory) *static_cast<std::pair<char*, size_t>*>(found) = {memory, bytes};
    return int(ours);
  };
  shared_anchor = 1;
  std::pair<char*, size_t> memory = {};
  dl_iterate_phdr(visit, &memory);
  return memory;
}

inline bool fail(cudaError_t error, const std::string& what) {
  state.last_error = error;
  state.message = what;
  return false;
}

inline std::string describe(const dim3& size) { return describe(uint3{size.x, size.y, size.z}); }

// Limits on the grid and the block, of every device that CUDA supports.
inline bool check_limits(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const std::string what = state.kernel + ": ";
  const uint64_t num_threads = uint64_t(block.x) * block.y * block.z;
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return fail(
        cudaErrorInvalidConfiguration,
        what + "the grid must be within (2147483647, 65535, 65535) and not empty, got " + describe(grid));
  }
  if (num_threads < 1 || num_threads > 1024 || block.z > 64) {
    return fail(cudaErrorInvalidConfiguration,
                what + "a block must have 1 to 1024 threads, at most 64 along z, got " + describe(block));
  }
  const auto limit = state.shared_limit.find(kernel);
  const size_t allowed = limit == state.shared_limit.end() ? kDefaultSharedBytes : limit->second;
  if (shared_bytes > allowed) {
    return fail(cudaErrorInvalidValue,
                what + "dynamic shared memory must be at most " + std::to_string(allowed) + " bytes, got " +
                    std::to_string(shared_bytes) + "; up to 232448 are to be had by cudaFuncSetAttribute");
  }
  return true;
}

inline void arrange_threads(dim3 block) {
  state.num_threads = size_t(block.x) * block.y * block.z;
  while (state.threads.size() < state.num_threads) state.threads.push_back(std::make_unique<Thread>());
  for (unsigned i = 0; i < state.num_threads; ++i) {
    Thread& thread = *state.threads[i];
    thread.index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
    thread.lane = i % warpSize;
    thread.warp = i / warpSize;
  }
}

// Every block finds its shared memory full of 0xff, NaN as a number: a device promises nothing about it.
inline void run_grid(size_t shared_bytes) {
  constexpr char kFill = char(0xff);
  const Unseen unseen;
  static const auto static_shared = find_static_shared();
  std::vector<uint64_t> turns(uint64_t(gridDim.x) * gridDim.y * gridDim.z);
  arrange(turns);
  state.meetings.clear();
  for (const uint64_t i : turns) {
    const uint64_t in_plane = uint64_t(gridDim.x) * gridDim.y;
    blockIdx = {unsigned(i % gridDim.x), unsigned(i / gridDim.x % gridDim.y), unsigned(i / in_plane)};
    state.dynamic_shared.reset(
        new char[shared_bytes]);  // just as long: AddressSanitizer sees what lies beyond
    std::memset(state.dynamic_shared.get(), kFill, shared_bytes);
    if (static_shared.first) std::memset(static_shared.first, kFill, static_shared.second);
    if (!kFindsRaces) state.meetings.clear();
    run_block();
    if (state.faulted) {
      state.last_error = cudaErrorLaunchFailure;
      return;
    }
    // Static shared memory is the same for all blocks, which is no race: such blocks are put in order.
    char* const end = static_shared.first + static_shared.second;
    const bool used = std::any_of(static_shared.first, end, [](char byte) { return byte != kFill; });
    if (kFindsRaces && used) depart(&state.meetings.back()->end);
  }
  for (const auto& meeting : state.meetings) depart(&meeting->end);
}

// As "segment_sum_kernel<T, 4> [with T = float]": the arguments are those of the function that launches it.
inline std::string describe_kernel(std::string_view name, std::string_view launcher, Site site) {
  if (name.front() == '(') name = name.substr(1, name.size() - 2);
  const size_t arguments = launcher.find('[');
  return std::string(name) +
         (arguments == launcher.npos ? "" : " " + std::string(launcher.substr(arguments))) + " (" +
         site.file + ":" + std::to_string(site.line) + ")";
}

// What stands for kernel<<<grid, block, shared_bytes, stream>>>: called with the arguments, it returns when
// the grid is done.
template <class... Parameters>
auto launch(const char* name, const char* launcher, Site site, void (*kernel)(Parameters...), dim3 grid,
            dim3 block, size_t shared_bytes, cudaStream_t) {
  return [=](Parameters... arguments) {
    state.kernel = describe_kernel(name, launcher, site);
    if (!check_limits(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes)) return;
    state.body = [&] { kernel(arguments...); };
    state.faulted = false;
    gridDim = grid;
    blockDim = block;
    arrange_threads(block);
    run_grid(shared_bytes);
  };
}

}  // namespace megagnn::emulation

inline cudaError_t cudaPeekAtLastError() { return megagnn::emulation::state.last_error; }
inline cudaError_t cudaGetLastError() {
  return std::exchange(megagnn::emulation::state.last_error, cudaSuccess);
}
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  return megagnn::emulation::state.message.c_str();  // says more than CUDA's sentence about the code
}

// Emulated work is done when it is asked for: there is nothing to wait for, and one stream is like another.
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t count, cudaStream_t = nullptr) {
  std::memset(to, byte, count);
  return cudaSuccess;
}

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t count, cudaMemcpyKind,
                                   cudaStream_t = nullptr) {
  std::memcpy(to, from, count);
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  using namespace megagnn::emulation;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || size_t(value) > kLargestSharedBytes) {
    fail(cudaErrorInvalidValue,
         "cudaFuncSetAttribute: dynamic shared memory must be at most 232448 bytes, got " +
             std::to_string(value));
    return cudaErrorInvalidValue;
  }
  state.shared_limit[reinterpret_cast<const void*>(kernel)] = size_t(value);
  return cudaSuccess;
}

// A device of 3 multiprocessors: few, so that kernels whose grid is made to fill the device go round their
// loops.
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      return cudaSuccess;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 3;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = 2048;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(megagnn::emulation::kLargestSharedBytes);
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* num_blocks, Kernel*, int, size_t) {
  *num_blocks = 2;
  return cudaSuccess;
}
